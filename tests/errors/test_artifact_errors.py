"""Damaged artifacts: every kind of file cut, changed, longer or gone, and the manifest itself."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli_runner import make_runner
from tests.fake_model import fake_artifact
from tilewright.compiler import artifact as sealed

FILES = (sealed.LIBRARY, sealed.PARAMS, sealed.TOKENIZER, sealed.COSTS)


@pytest.fixture
def refused(capsys, monkeypatch) -> Callable[..., str]:
    """refused(*arguments) -> the sentence; exit code 2, one line, nothing on stdout."""
    run = make_runner(capsys, monkeypatch)

    def check(*arguments: str) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return check


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact with a file of every kind."""
    path = fake_artifact(tmp_path / "whole.tw").path
    (path / sealed.PARAMS).parent.mkdir()
    (path / sealed.PARAMS).write_bytes(bytes(range(256)) * 20)
    (path / sealed.TOKENIZER).write_text('{"model": {}}')
    manifest = sealed.Artifact.open(path).manifest
    (path / sealed.MANIFEST).unlink()
    sealed.seal(path, manifest)
    assert set(sealed.Artifact.open(path).manifest.files) == set(FILES)
    return path


def both(refused: Callable[..., str], artifact: Path) -> str:
    """What looking at it and serving it say: the same."""
    said = refused("inspect", str(artifact))
    assert refused("generate", str(artifact), "--prompt", "x") == said
    return said


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_file_of_another_size(refused, artifact, name, size):
    file = artifact / name
    whole = file.read_bytes()
    file.write_bytes(whole + b"x" if size == 1 else whole[:size])
    found, expected = file.stat().st_size, len(whole)
    assert both(refused, artifact) == f"{file} has {found} bytes, {expected} expected; compile the model again"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone(refused, artifact, name):
    (artifact / name).unlink()
    assert f"{artifact / name} is missing, " in both(refused, artifact)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_bit_that_has_flipped(refused, artifact, name, place):
    data = bytearray((artifact / name).read_bytes())
    data[place] ^= 1
    (artifact / name).write_bytes(data)
    said = both(refused, artifact)
    assert said == f"{artifact / name} does not match its checksum; compile the model again"


def test_a_manifest_cut_anywhere(refused, artifact):
    file = artifact / sealed.MANIFEST
    whole = file.read_bytes().rstrip()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        said = refused("inspect", str(artifact))
        assert said == f"{file} is no artifact manifest (not JSON, or cut short); compile it again"


@pytest.mark.parametrize("text", ["[]", "7", "null", "{}", '"schema"'])
def test_a_manifest_that_is_something_else(refused, artifact, text):
    (artifact / sealed.MANIFEST).write_text(text)
    assert "is no artifact manifest" in refused("inspect", str(artifact))


def test_a_manifest_that_is_no_text(refused, artifact):
    (artifact / sealed.MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert "manifest.json can't be read" in refused("inspect", str(artifact))


@pytest.mark.parametrize(
    "changes", [{"name": "other"}, {"files": {}}, {"limits": {"max_batch": 1}}, {"extra": 1}, {"seal": ""}]
)
def test_a_manifest_that_was_edited(refused, artifact, changes):
    file = artifact / sealed.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert both(refused, artifact) == (
        f"{file} does not match its own checksum: it was changed; compile the model again"
    )


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        (sealed.SCHEMA + 1, "newer than this version's 1; upgrade tilewright or compile the model again"),
        (sealed.SCHEMA - 1, "older than this version's 1; compile the model again"),
        ("2.0", "newer than this version's 1; upgrade tilewright or compile the model again"),
    ],
)
def test_another_schema(refused, artifact, schema, sentence):
    """Said before anything else is read: the rest may have any form."""
    (artifact / sealed.MANIFEST).write_text(json.dumps({"schema": schema, "shape": "unknown"}))
    assert both(refused, artifact) == f"{artifact} has artifact schema {schema}, {sentence}"
