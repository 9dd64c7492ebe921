"""The artifact of a real compile: whole, relocatable, the same bytes every time, and mapped rather than read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

import tilewright
from tests.checkpoints import make_gguf
from tilewright.compiler import env
from tilewright.compiler.artifact import ALIGNMENT, COSTS, LIBRARY, MANIFEST, PARAMS, Artifact, sha256
from tilewright.compiler.codegen.program import _order_shape_stores
from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS

TOKENS = [5, 99, 3, 42, 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of blocks that are stored in another format, plain vectors, and a vocabulary that leaves a block of rows
    part empty."""
    sizes = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return make_gguf(tmp_path_factory.mktemp("model"), "llama", "Q5_1", **sizes)


@pytest.fixture(scope="module")
def path(checkpoint: Path, compile_tiny: Callable[..., Path]) -> Path:
    return compile_tiny(checkpoint)


def files(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_the_manifest_describes_the_model(path: Path) -> None:
    manifest = Artifact.open(path).manifest
    assert manifest.schema == 1
    assert manifest.target["kind"] == "cpu" and manifest.target["features"]
    assert (manifest.model["family"], manifest.model["layers"], manifest.model["vocab"]) == ("llama", 2, 203)
    assert manifest.limits == {"max_batch": 4, "max_tokens": 64, "max_context": 512, "page_size": 16}
    assert manifest.embedding == {"pooling": "last", "dimensions": manifest.model["hidden"], "normalized": True}
    assert manifest.step["inputs"] == [*STEP_INPUTS, *SAMPLING_INPUTS]
    assert [(b.function, b.tokens, b.static) for b in manifest.buckets] == [("step_1", 1, True), ("step", 64, False)]
    assert manifest.provenance["source"]["kind"] == "gguf" and manifest.provenance["quant"] == "auto"
    assert manifest.provenance["tilewright"] == tilewright.__version__
    kv = manifest.kv
    assert (kv["layers"], kv["kv_heads"], kv["head_dim"], kv["page_size"]) == (2, 1, 64, 16)
    assert manifest.memory["page_bytes"] == 2 * 2 * 1 * 16 * 64 * np.dtype(kv["dtype"]).itemsize
    assert manifest.memory["weights_bytes"] == sum(p.bytes for p in manifest.params)
    assert {p.format for p in manifest.params} == {"q8_0", "f32"}
    assert manifest.warnings == ("15 tensors of q5_1 become q8_0",)


def test_the_manifest_lists_every_file_with_its_checksum(path: Path) -> None:
    listed = Artifact.open(path).manifest.files
    assert set(listed) == set(files(path)) - {MANIFEST} >= {LIBRARY, PARAMS, COSTS}
    for name, about in listed.items():
        assert about == {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}


def test_every_kernel_tells_schedule_tile_floor_and_calls(path: Path) -> None:
    kernels = Artifact.open(path).manifest.kernels
    assert len({k["name"] for k in kernels}) == len(kernels)
    assert {k["composite"] for k in kernels} >= {"linear", "embedding", "qkv_append", "paged_attention", "sample"}
    picked = {name for kernel in kernels for _, name in kernel.get("picks", ())}
    assert picked <= {k["name"] for k in kernels}
    for kernel in kernels:
        assert kernel["name"].startswith(kernel["schedule"])
        assert kernel["calls"] or kernel["name"] in picked
        assert set(kernel["calls"]) <= {"step", "step_1", "logits", "hidden", "layers"}
        assert isinstance(kernel["tile"], dict) != ("picks" in kernel)
        assert kernel["rows"] in (None, kernel["max_rows"])
    assert any(k["calls"] == {"step_1": k["calls"].get("step_1")} for k in kernels), "none is the lone decode's own"


def test_costs_tell_the_floor_of_every_function(path: Path) -> None:
    manifest = Artifact.open(path).manifest
    costs = json.loads((path / COSTS).read_text())
    assert set(costs) >= {"logits", *(b.function for b in manifest.buckets)}
    for function in ("step", "step_1"):
        floor = costs[function]["floor"]
        assert set(floor) == {"bytes_fixed", "bytes_per_row", "flops_per_row"}
        # Every weight is read once: the tied table counts as the head's, its lookup is per row.
        assert floor["bytes_fixed"] == manifest.memory["weights_bytes"]
        elements = sum(p.rows * p.columns for p in manifest.params if p.columns)
        assert 2 * elements <= floor["flops_per_row"] <= 3 * elements


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_two_compiles_give_equal_bytes(checkpoint: Path, path: Path, tmp_path: Path) -> None:
    """In processes with other orders of sets; the second without the first's kernels, one after the other."""
    script = "import sys, tilewright; tilewright.compile(sys.argv[1], output=sys.argv[2], max_batch=4, max_tokens=64)"
    expected = files(path)
    for seed, changed in (("1", {}), ("2", {env.CACHE_DIR: str(tmp_path / "cache"), env.JOBS: "1"})):
        output = tmp_path / seed / "other-name.tw"
        command = [sys.executable, "-c", script, str(checkpoint), str(output)]
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed} | changed, check=True, timeout=300)
        actual = files(output)
        assert [name for name in expected if actual.get(name) != expected[name]] == []
        assert set(actual) == set(expected)


def test_extents_are_computed_in_the_order_of_their_slots() -> None:
    """TVM gives them in an order that differs from process to process."""

    @T.prim_func(s_tir=True)
    def shape_func(H: T.Buffer((T.int64(3),), "int64")):
        T.func_attr({"tirx.is_host_func": True})
        H[T.int64(2)] = H[T.int64(0)] * T.int64(7)
        H[T.int64(1)] = H[T.int64(0)] * T.int64(5)

    ordered = _order_shape_stores(tvm.IRModule({"shape_func": shape_func}))["shape_func"]
    assert [int(store.indices[0]) for store in ordered.body.seq] == [1, 2]


# ---- anywhere --------------------------------------------------------------------------------------------------------


def test_moved_to_another_directory_it_runs(path: Path, tmp_path: Path) -> None:
    """In a fresh process that stands elsewhere, knows no kernel cache, and gets a relative path."""
    logits = tilewright.load(path, kv_tokens=64).logits(TOKENS)
    moved = tmp_path / "a place" / "renamed"
    moved.parent.mkdir()
    path.rename(moved)
    script = (
        "import sys, tilewright\n"
        "model = tilewright.load(sys.argv[1], kv_tokens=64)\n"
        f"sys.stdout.buffer.write(model.logits({TOKENS}).tobytes())\n"
    )
    environment = os.environ | {env.CACHE_DIR: str(tmp_path / "no-cache")}
    command = [sys.executable, "-c", script, "a place/renamed"]
    try:
        run = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    finally:
        moved.rename(path)
    assert run.stdout == logits.tobytes()
    assert not (tmp_path / "no-cache").exists()


def test_compiling_over_an_artifact_replaces_it(
    checkpoint: Path, path: Path, compile_tiny: Callable[..., Path]
) -> None:
    before = files(path)
    (path / "left over").write_text("of another compile")
    assert compile_tiny(checkpoint, output=path) == path
    assert files(path) == before
    assert [f.name for f in path.parent.iterdir()] == [path.name]  # nothing is left beside it


# ---- weights ---------------------------------------------------------------------------------------------------------


def mapped_ranges(file: Path) -> list[tuple[int, int]]:
    """Where `file` is mapped into this process."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if len(line) == 6 and line[5] == str(file.resolve())]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def test_weights_are_mapped_and_aligned(path: Path) -> None:
    artifact = Artifact.open(path)
    arrays = artifact.map_params()
    ranges = mapped_ranges(path / PARAMS)
    assert len(arrays) == len(artifact.manifest.params)
    for param, array in zip(artifact.manifest.params, arrays, strict=True):
        assert (array.shape, str(array.dtype), array.nbytes) == (param.shape, param.dtype, param.bytes)
        address = array.ctypes.data
        assert address % ALIGNMENT == 0, param.name
        if param.bytes % ALIGNMENT == 0:
            assert any(start <= address and address + array.nbytes <= end for start, end in ranges), param.name


def test_writing_to_a_mapped_weight_leaves_the_file_alone(path: Path) -> None:
    before = sha256(path / PARAMS)
    Artifact.open(path).map_params()[0][...] = 1
    assert sha256(path / PARAMS) == before
