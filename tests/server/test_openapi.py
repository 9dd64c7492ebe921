"""The OpenAPI document, held against the server by schemathesis: what it allows is taken, what it forbids is refused,
and all answers are as it says."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from tests.server.serving import MODEL, Running, running
from tilewright.runtime.server.app import ENDPOINTS
from tilewright.runtime.server.openapi import document
from tilewright.runtime.types import EngineLimits

pytestmark = pytest.mark.timeout(120)

# What no schema can say: that tokens are in the vocabulary, that a prompt fits the context, that fields fit together.
BEYOND_SCHEMAS = (
    "model_limit", "context_length_exceeded", "deadline_too_short", "invalid_combination", "unsupported_grammar"
)  # fmt: skip


@schemathesis.check
def taken_where_allowed(ctx, response, case):
    if case.meta.generation.mode.is_positive and response.status_code == 400:
        assert response.json()["error"]["code"] in BEYOND_SCHEMAS, response.text


@pytest.fixture(scope="module")
def _shared() -> Iterator[Running]:
    """Short answers: what is said matters little here."""
    with running(engine_limits=EngineLimits(max_answer=4)) as it:
        yield it


API = schemathesis.openapi.from_dict(document(ENDPOINTS, [MODEL], keyed=False))
API.config.checks.negative_data_rejection.expected_statuses.append("413")
API.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])


@API.parametrize()
@settings(max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_the_document_is_true(server: Running, case: schemathesis.Case) -> None:
    case.call_and_validate(server.url, excluded_checks=[positive_data_acceptance, ignored_auth], timeout=20)


WIDE = f"""
import schemathesis
@schemathesis.check
def taken_where_allowed(ctx, response, case):
    if case.meta is not None and case.meta.generation.mode.is_positive and response.status_code == 400:
        assert response.json()["error"]["code"] in {BEYOND_SCHEMAS!r}, response.text
@schemathesis.check
def an_error_is_one_sentence(ctx, response, case):
    if response.status_code >= 400 and case.path.startswith("/v1") and case.method != "HEAD":
        message = response.json()["error"]["message"]
        assert message and "\\n" not in message, response.text
"""


@pytest.mark.slow
@pytest.mark.timeout(590)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_phase_of_schemathesis(server: Running, mode: str, tmp_path: Path) -> None:
    """Examples, every keyword's coverage, then random requests, NUL bytes within; the document has no links, which
    stateful tests would follow. Fresh requests each time."""
    (tmp_path / "checks.py").write_text(WIDE)
    (tmp_path / "schemathesis.toml").write_text("[checks.negative_data_rejection]\nexpected-statuses = ['4xx']\n")
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json", "--no-color"]
    options = {
        "mode": mode,
        "phases": "examples,coverage,fuzzing,stateful",
        "generation-allow-x00": "true",
        "generation-database": "none",
        "exclude-checks": "positive_data_acceptance,ignored_auth",
        "max-examples": "100",
        "max-time": "60",
        "request-timeout": "20",
    }
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "checks", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_document_has_every_path_and_no_name_of_python(server: Running) -> None:
    served = server.ask("GET", "/openapi.json")[2]
    assert set(served["paths"]) == {e.path.replace(":path}", "}") for e in ENDPOINTS}
    assert served == document(ENDPOINTS, [MODEL], keyed=False)
    schemas = served["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == [MODEL]
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert not any("__" in name for name in schemas)
