"""Dense linears without wgmma: values against float64, and a row's bits whatever the number of tokens and the tile."""

import re
from dataclasses import replace

import numpy as np
import pytest

from tests.breadth import quick
from tests.cuda_runner import CudaRunner, cuda_target
from tests.kernel_runner import lower
from tests.schedules.cuda.test_linear import arguments, call, dense, gated, of_rows, reference, runners
from tests.tolerances import assert_close
from tilewright.compiler.composites import LinearSpec, NormSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Reject
from tilewright.schedules.cuda.linear_mma import LinearMma
from tilewright.schedules.cuda.linear_mma_tile import LinearMmaTile

LINEAR = LinearMma()
OLDER = ("nvidia-a100", "nvidia-l40s", "nvidia-rtx-4090")

CASES = [
    dense(64, 64),
    dense(576, 576, residual=True),
    dense(200, 136, bias=True, residual=True),
    dense(960, 576, "float16", bias=True),
    dense(1001, 256, out_dtype="float32"),
    dense(77, 100, "float16", bias=True, residual=True),
    dense(1, 2),
    dense(72, 1030, bias=True, out_dtype="float32"),
    gated(3072, 576, residual=True),
    gated(208, 72, "gelu_tanh", bias=True),
    dense(4096, 1024),
]
IDS = [f"{s.out_features}x{s.in_features}-{s.dtype}{'-gate' * bool(s.gate)}" for s in CASES]
SIZES = (1, 2, 8, 9, 16, 31, 64, 100, 256, 300, 1030)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_values_and_equal_bits_for_any_number_of_rows(spec: LinearSpec) -> None:
    import torch

    seed = int(np.random.default_rng().integers(2**31))
    print(f"{seed=}")
    given = arguments(spec, max(SIZES), seed)
    expected = reference(spec, given)
    runs = dict(zip(SIZES, runners([lower(LINEAR, call(spec, m), cuda_target()) for m in SIZES]), strict=True))
    for m, run in runs.items():
        part = of_rows(spec, given, slice(m))
        (y,) = run(*part)
        torch.cuda.synchronize()
        assert_close(y.float().cpu().numpy(), expected[:m], spec.out_dtype)
        for row in {0, m // 2, m - 1}:
            (alone,) = runs[1](*of_rows(spec, part, slice(row, row + 1)))
            torch.cuda.synchronize()
            assert torch.equal(alone[0], y[row]), f"row {row} of {m}"


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 13, 64, 200])
def test_every_tile_gives_the_same_bits(m: int) -> None:
    """Those of targets with less shared memory too, and as many tokens as it was not made for."""
    import torch

    spec = dense(592, 456, residual=True)
    given = arguments(spec, m, 1)
    facts = LINEAR.match(call(spec, m), cuda_target())
    tiles = {tile for name in ("nvidia-h100", *OLDER) for tile in LINEAR.space(facts, RECORDS[name])}
    results = {}
    for tile, run in zip(tiles, runners([LINEAR.apply(facts, tile, cuda_target()) for tile in tiles]), strict=True):
        results[tile] = run(*given)[0]
        torch.cuda.synchronize()
    first = next(iter(results.values()))
    assert not [tile for tile, y in results.items() if not torch.equal(y, first)]


@pytest.mark.gpu
def test_what_the_next_kernel_reads_is_there() -> None:
    """A chain in a graph, of which each takes what the one before wrote."""
    import torch

    spec = dense(512, 512)
    first, second = (arguments(spec, 100, seed) for seed in (1, 2))
    run = CudaRunner(lower(LINEAR, call(spec, 100), cuda_target()))
    launches, x = [], first[0]
    for i in range(8):
        launch, (x,) = run.bind(x, (first if i % 2 else second)[1])
        launches.append(launch)

    def all_of_them() -> None:
        for launch in launches:
            launch()

    all_of_them()
    torch.cuda.synchronize()
    expected, stream, graph = x.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    assert not expected.isnan().any()
    with torch.cuda.graph(graph, stream=stream):
        all_of_them()
    for _ in range(5):
        x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(x, expected)


@pytest.mark.parametrize("target", quick(("nvidia-a100",), OLDER))
@pytest.mark.parametrize("spec", [dense(4096, 4096, residual=True), gated(28672, 4096)], ids=["o", "gate_up"])
def test_every_tile_compiles_within_registers(spec: LinearSpec, target: str) -> None:
    record = RECORDS[target]
    facts = LINEAR.match(call(spec, 64), record)
    for tile in LINEAR.space(facts, record):
        run = CudaRunner(LINEAR.apply(facts, tile, record), record)
        assert re.search(r" STACK:0 .* LOCAL:0 ", run.resources(0)), tile
        code = run.sass(0)
        assert "HMMA.16816.F32" in code and "LDGSTS" in code and "LDSM" in code


@pytest.mark.parametrize("target", ["nvidia-h100", "nvidia-a100"])
def test_a_gate_is_rounded_before_the_residual_is_added(target: str) -> None:
    """In every tile: the product contracted with the sum would give other bits."""
    record = RECORDS[target]
    facts = LINEAR.match(call(gated(3072, 576, residual=True), 64), record)
    for tile in LINEAR.space(facts, record):
        code = CudaRunner(LINEAR.apply(facts, tile, record), record).sass(0)
        assert not re.search(r"\bFFMA\b", code[code.rindex("HMMA") :]), tile


def test_compiles_for_hopper() -> None:
    run = CudaRunner(lower(LINEAR, call(gated(1024, 512), 300), cuda_target()))
    assert re.search(r" STACK:0 .* LOCAL:0 ", run.resources(0))
    assert "ACQBULK" in run.sass(0)  # griddepcontrol.wait


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    def reason(spec: LinearSpec) -> str:
        rejected = LINEAR.match(call(spec, 8), RECORDS["nvidia-a100"])
        assert isinstance(rejected, Reject)
        return rejected.reason

    assert "are not rows of" in reason(replace(dense(64, 64), weight_format="f16_rows"))
    assert "4 bytes" in reason(dense(64, 63))
    assert "no multiple of 8" in reason(gated(24, 64))
    assert "kernels of their own" in reason(dense(64, 64, norm=NormSpec(64, 1e-5)))
    assert "are not stored" in reason(dense(64, 64, out_dtype="float32", residual=True))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"tokens": 24}, "24 tokens are no multiple of 16"),
        ({"rows": 48}, "48 rows are no multiple of 16 for each of 2 warps"),
        ({"depth": 96}, "depth 96"),
        ({"tokens": 256, "rows": 128}, "256 sums"),
        ({"stages": 1}, "1 stages"),
    ],
)
def test_a_tile_checks_itself(fields: dict[str, int], message: str) -> None:
    shape = {"tokens": 64, "rows": 64, "token_warps": 2, "row_warps": 2, "depth": 64, "stages": 4}
    with pytest.raises(ValueError, match=message):
        LinearMmaTile(**(shape | fields))


@pytest.mark.parametrize("target", ["nvidia-h100", *OLDER])
@pytest.mark.parametrize("m", [1, 16, 64, 128, 256, 2048])
@pytest.mark.parametrize("n,k", [(576, 576), (6144, 4096), (128256, 4096), (17, 8)])
def test_tiles_fit_in_shared_memory(n: int, k: int, m: int, target: str) -> None:
    record = RECORDS[target]
    space = LINEAR.space(LINEAR.match(call(dense(n, k, out_dtype="float32"), m), record), record)
    assert space
    for tile in space:
        assert tile.shared_bytes <= record.shared_memory_bytes
        assert tile.blocks_per_sm * (tile.shared_bytes + 1024) <= record.shared_memory_bytes + 1024
        assert tile.blocks_per_sm * tile.threads * 128 <= 65536
