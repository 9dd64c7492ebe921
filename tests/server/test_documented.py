"""docs/serving.md against the server: its limits and its codes."""

import dataclasses
import re
from pathlib import Path

from tilewright.runtime.server.limits import ServerLimits

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()


def test_every_limit_stands_there_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE, re.M))
    for field in dataclasses.fields(ServerLimits):
        assert rows[field.name].strip() == str(field.default), field.name


def test_every_code_stands_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "runtime" / "server").glob("*.py"))
    used = set(re.findall(r'code="(\w+)"', sources)) | set(re.findall(r', "(\w+)"\)', sources))
    codes = {code for code in used if re.search(rf'(code=|(too_many|unavailable)\(.*)"{code}"', sources)} - {"bug"}
    assert len(codes) > 15
    assert codes <= set(re.findall(r"`(\w+)`", PAGE)), codes - set(re.findall(r"`(\w+)`", PAGE))
