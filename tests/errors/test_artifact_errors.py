"""Damaged artifacts: every kind of file cut, changed, longer or gone, and the manifest itself."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli_runner import make_runner
from tests.fake_model import fake_artifact
from tilewright.compiler import artifact as sealed
from tilewright.compiler.errors import ArtifactError

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


# ---- sealed, and yet of another form ---------------------------------------------------------------------------------


def resealed(artifact: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The artifact with a manifest that was changed and sealed again, as anybody can."""
    file = artifact / sealed.MANIFEST
    fields = json.loads(file.read_text())
    del fields["seal"]
    change(fields)
    file.write_text(json.dumps({**fields, "seal": sealed._seal(sealed._canonical(fields))}))
    return artifact


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Changes the value at a path such as kv.layers; ... takes it away."""

    def change(fields: Any) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for part in way:
            fields = fields[part]
        if value is ...:
            del fields[last]
        else:
            fields[last] = value

    return change


DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"a": DEEP}
PARAM = {"name": "w", "shape": [2], "dtype": "float32", "sources": [], "format": "f32", "rows": 2, "columns": None}
FILE = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("name", 7, "name is 7, not a text"),
        ("name", ..., "name is missing"),
        ("extra", 1, "extra is no field of it"),
        ("x" * 500, 1, "x... is no field of it"),
        ("schema", True, "schema is True, not a whole number"),
        ("schema", 1.0, "schema is 1.0, not a whole number"),
        ("target", [], "target is [], not an object"),
        ("target/features", "avx2", "target.features is 'avx2', not a list"),
        ("target/features", [None], "target.features.0 is None, not a text"),
        ("target/kind", ..., "target.kind is missing"),
        ("limits/max_batch", "4", "limits.max_batch is '4', not a whole number of 1 to"),
        ("limits/max_batch", 0, "limits.max_batch is 0, not a whole number of 1 to"),
        ("limits/max_batch", True, "limits.max_batch is True"),
        ("limits/max_batch", 1.5, "limits.max_batch is 1.5"),
        ("limits/max_batch", 10**30, "limits.max_batch is 1000"),
        ("limits/other", 1, "limits.other is no field of it"),
        ("limits/max_tokens", 33, "step.buckets has none for any number of tokens up to limits.max_tokens 33"),
        ("kv/page_size", 8, "kv.page_size is 8, not limits.page_size 16"),
        ("kv/layers", -1, "kv.layers is -1"),
        ("step/buckets", [], "step.buckets is [], not a list of 1 or more"),
        ("step/buckets/0/static", 1, "step.buckets.0.static is 1, not true or false"),
        ("step/top_logprobs", None, "step.top_logprobs is None"),
        ("model/vocab", ..., "model.vocab is missing"),
        ("memory/page_bytes", 0, "memory.page_bytes is 0"),
        ("params", {}, "params is {}, not a list"),
        ("params", [{**PARAM, "shape": [-1]}], "params.0.shape.0 is -1"),
        ("params", [{**PARAM, "shape": [1 << 40] * 9}], "params.0.shape has"),
        ("params", [{**PARAM, "dtype": "object"}], "the dtype of w is 'object'"),
        ("params", [{**PARAM, "more": 1}], "params.0.more is no field of it"),
        ("kernels", [7], "kernels.0 is 7, not an object"),
        ("kernels/0/calls", {"step": "many"}, "kernels.0.calls.step is 'many'"),
        ("kernels/0/floor", {"bytes_fixed": "x"}, "kernels.0.floor.bytes_fixed is 'x', not a number"),
        ("tokenizer/stop_token_ids", ["x"], "tokenizer.stop_token_ids.0 is 'x'"),
        ("tokenizer/chat_template", 3, "tokenizer.chat_template is 3, not a text"),
        ("provenance", "here", "provenance is 'here', not an object"),
        ("provenance/deep", DEEP, "nested deeper than 32"),
        ("warnings", [1], "warnings.0 is 1, not a text"),
        ("files", [], "files is [], not an object"),
        ("files/model.so", None, "files.model.so is None, not an object"),
        ("files/model.so/sha256", "0" * 63, "not a SHA-256 checksum"),
        ("files/model.so/bytes", -1, "files.model.so.bytes is -1"),
        ("files", {"../model.so": FILE}, "'../model.so', which is no place within an artifact"),
        ("files", {"/etc/passwd": FILE}, "'/etc/passwd', which is no place"),
        ("files", {"a/../../b": FILE}, "which is no place within"),
        ("files", {"a\\b": FILE}, "which is no place within"),
        ("files", {"a\0b": FILE}, "which is no place within"),
        ("files", {"": FILE}, "which is no place within"),
        ("files", {".": FILE}, "which is no place within"),
        ("files", {"a//b": FILE}, "which is no place within"),
        ("files", {"manifest.json": FILE}, "which is no place within"),
    ],
)
def test_a_manifest_of_another_form(refused, artifact, path, value, words):
    said = both(refused, resealed(artifact, put(path, value)))
    assert words in said and said.endswith("; compile the model again") and "manifest.json" in said
    assert len(said) < 400 + len(str(artifact))


def test_a_manifest_that_lists_no_program(refused, artifact):
    resealed(artifact, lambda fields: fields["files"].pop(sealed.LIBRARY))
    assert both(refused, artifact) == f"{artifact / sealed.MANIFEST} lists no model.so; compile the model again"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
def test_a_number_that_is_none(refused, artifact, number):
    file = artifact / sealed.MANIFEST
    file.write_text(file.read_text().replace('"name": "alphabet"', f'"name": {number}'))
    assert f"{file} is no artifact manifest (" in both(refused, artifact)


def test_json_that_is_nested_beyond_any_reader(refused, artifact):
    (artifact / sealed.MANIFEST).write_text("[" * 200_000)
    assert "is no artifact manifest (" in refused("inspect", str(artifact))


def test_a_manifest_beyond_any_size(refused, artifact):
    """A sparse file: it takes no room, and would take all memory if it were read."""
    with (artifact / sealed.MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)
    assert "it has 1099511627776 bytes, 268435456 at most" in both(refused, artifact)


def test_a_schema_that_says_more_than_a_number(refused, artifact):
    (artifact / sealed.MANIFEST).write_text(json.dumps({"schema": ["a\nb", "x" * 10_000]}))
    said = refused("inspect", str(artifact))
    assert "newer than this version's 1" in said and len(said) < 300 + len(str(artifact))


# ---- what stands where a file should ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [sealed.LIBRARY, sealed.PARAMS, "params"])
def test_a_link_in_place_of_a_file(refused, artifact, tmp_path, name):
    (artifact / name).rename(tmp_path / "elsewhere")
    (artifact / name).symlink_to(tmp_path / "elsewhere")
    assert both(refused, artifact) == (
        f"{artifact / name} is a link, and an artifact has files alone; copy what it points to there"
    )


def test_an_artifact_may_be_reached_by_a_link(artifact, tmp_path):
    (tmp_path / "current.tw").symlink_to(artifact)
    assert sealed.Artifact.open(tmp_path / "current.tw").manifest.name == "alphabet"


@pytest.mark.timeout(20)
def test_pipes_and_directories_in_place_of_files(refused, artifact):
    """A pipe that nobody writes to would be read for ever."""
    for name, make in ((sealed.COSTS, os.mkfifo), (sealed.TOKENIZER, os.mkdir), (sealed.MANIFEST, os.mkfifo)):
        (artifact / name).unlink()
        make(artifact / name)
        said = both(refused, artifact)
        assert f"{artifact / sealed.COSTS} is missing" in said or f"it has no {sealed.MANIFEST}" in said


# ---- weights ---------------------------------------------------------------------------------------------------------


def with_weights(artifact: Path, data: bytes, **changes: Any) -> sealed.Artifact:
    """The artifact with this file of weights, sealed anew, and one param."""
    (artifact / sealed.PARAMS).write_bytes(data)
    about = {"bytes": len(data), "sha256": sealed.sha256(artifact / sealed.PARAMS)}

    def change(fields: dict[str, Any]) -> None:
        fields["files"][sealed.PARAMS] = about
        fields["params"] = [PARAM | changes]

    return sealed.Artifact.open(resealed(artifact, change))


def tensors(header: Any, data: bytes = bytes(8), size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def test_weights_that_are_there(artifact):
    [weight] = with_weights(artifact, tensors(entry(), np.array([1, 2], np.float32).tobytes())).map_params()
    assert weight.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("data", "changes", "words"),
    [
        (b"", {}, "holds no tensors"),
        (b"1234567", {}, "holds no tensors (the header is longer than the file)"),
        (tensors(entry(), size=1 << 63), {}, "the header is longer than the file"),
        (tensors(b"{"), {}, "holds no tensors"),
        (tensors(b"[" * 100_000), {}, "holds no tensors"),
        (tensors(b"\xff"), {}, "holds no tensors"),
        (tensors([1]), {}, "holds no tensors"),
        (tensors({"w": None}), {}, "holds no tensors"),
        (tensors({}), {}, "the tensor w is not there"),
        (tensors(entry(dtype="F99")), {}, "holds no tensors ('F99')"),
        (tensors(entry(shape=[3])), {}, "holds no tensors"),
        (tensors(entry(shape="x")), {}, "holds no tensors"),
        (tensors(entry(data_offsets=[0, 9])), {}, "a tensor lies at bytes 0 to 9 of 8"),
        (tensors(entry(data_offsets=[-8, 0])), {}, "a tensor lies at bytes -8 to 0"),
        (tensors(entry(data_offsets=[8, 0])), {}, "a tensor lies at bytes 8 to 0"),
        (tensors(entry(data_offsets=[0, 4], shape=[1])), {}, "the tensor w is of 4 bytes, float32[2] expected"),
        (tensors(entry()), {"name": "v"}, "the tensor v is not there"),
        (tensors(entry()), {"shape": [2, 2]}, "the tensor w is of 8 bytes, float32[2, 2] expected"),
    ],
)
def test_weights_that_are_none(artifact, data, changes, words):
    opened = with_weights(artifact, data, **changes)
    with pytest.raises(ArtifactError) as error:
        opened.map_params()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_not_listed(artifact):
    opened = sealed.Artifact.open(resealed(artifact, lambda fields: fields["files"].pop(sealed.PARAMS)))
    with pytest.raises(ArtifactError, match=r"lists no params/model\.safetensors"):
        opened.map_params()


# ---- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"step_1": 7}', '{"step_1": {"floor": {"x": 1}}}', '{"step_1": {"floor": {"bytes_fixed": NaN}}}'],
)
def test_costs_of_another_form(refused, artifact, text):
    (artifact / sealed.COSTS).write_text(text)
    about = {"bytes": len(text), "sha256": sealed.sha256(artifact / sealed.COSTS)}
    resealed(artifact, put("files/costs.json", about))
    said = refused("inspect", str(artifact))
    assert "costs.json" in said and said.endswith(("compile the model again", "compile it again"))
