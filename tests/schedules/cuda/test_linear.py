"""Dense linears on Hopper: values against float32, and a row's bits whatever the number of tokens and the tile."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tests.cuda_runner import CudaRunner, cuda_target
from tests.kernel_runner import lower
from tests.tolerances import assert_close
from tilewright.compiler.composites import GatedSpec, LinearSpec, NormSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Call, Lowering, Reject
from tilewright.schedules.cuda.linear import Linear
from tilewright.schedules.cuda.linear_few_tile import LinearFewTile, few_tiles
from tilewright.schedules.cuda.linear_parts import parts_of
from tilewright.schedules.cuda.linear_tile import LinearTile, tiles

LINEAR = Linear()


def dense(n: int, k: int, dtype: str = "bfloat16", **more: object) -> LinearSpec:
    form = {"bfloat16": "bf16_rows", "float16": "f16_rows"}[dtype]
    fields: dict[str, object] = {"weight_format": form, "dtype": dtype, "out_dtype": dtype}
    return LinearSpec(n, k, **(fields | more))  # type: ignore[arg-type]


def gated(n: int, k: int, activation: str = "silu", **more: object) -> LinearSpec:
    return dense(n, k, gate=GatedSpec(n // 2, activation, "bfloat16"), **more)


CASES = [
    dense(64, 64),
    dense(576, 576, residual=True),
    dense(200, 136, bias=True, residual=True),
    dense(960, 576, "float16", bias=True),
    dense(1001, 256, out_dtype="float32"),
    dense(40, 2048, "float16", residual=True),
    gated(3072, 576),
    gated(208, 72, "gelu_tanh", bias=True),
    dense(4096, 1024),
    dense(960, 576, norm=NormSpec(576, 1e-5)),
    gated(208, 112, norm=NormSpec(112, 1e-5)),
]
IDS = [f"{s.out_features}x{s.in_features}-{s.dtype}{'-gate' * bool(s.gate)}{'-norm' * bool(s.norm)}" for s in CASES]
SIZES = (1, 2, 8, 9, 16, 31, 64, 100, 256, 300, 1030)


def call(spec: LinearSpec, m_max: int) -> Call:
    return Call("linear", spec, None, m_max)


def arguments(spec: LinearSpec, m: int, seed: int):
    """Of the composite, on the GPU. x and the residual are followed by rows that must not be read."""
    import torch

    made = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, spec.dtype)

    def normal(*shape: int, scale: float = 1.0):
        return torch.randn(*shape, generator=made, device="cuda") * scale

    def rows(columns: int):
        padded = torch.full((m + 300, columns), float("nan"), device="cuda", dtype=dtype)
        padded[:m] = normal(m, columns).to(dtype)
        return padded[:m]

    outs = spec.result_features
    weight = normal(spec.out_features, spec.in_features, scale=spec.in_features**-0.5).to(dtype)
    gain = [normal(spec.in_features)] if spec.norm else []
    bias = [normal(spec.out_features)] if spec.bias else []
    return [rows(spec.in_features), weight, *gain, *bias, *([rows(outs)] if spec.residual else [])]


def reference(spec: LinearSpec, given: list) -> np.ndarray:
    """In float64, rounded nowhere but after a norm."""
    import torch

    x, weight, *rest = [a.double() for a in given]
    if spec.norm:
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + spec.norm.eps) * rest.pop(0)
        x = x.to(given[0].dtype).double()
    y = x @ weight.T
    if spec.bias:
        y = y + rest[0]
    if spec.gate:
        gate, up = y.chunk(2, -1)
        act = torch.nn.functional.silu(gate) if spec.gate.activation == "silu" else None
        y = up * (torch.nn.functional.gelu(gate, approximate="tanh") if act is None else act)
    if spec.residual:
        y = y + rest[-1]
    return y.cpu().numpy()


def runners(lowerings: list[Lowering]) -> list[CudaRunner]:
    """Compiled side by side."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(CudaRunner, lowerings))


def of_rows(spec: LinearSpec, given: list, rows: slice) -> list:
    """The arguments for some of the tokens."""
    count = given[0].shape[0]
    per_token = {0, len(given) - 1} if spec.residual else {0}
    assert all(given[i].shape[0] == count for i in per_token)
    return [a[rows] if i in per_token else a for i, a in enumerate(given)]


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
@pytest.mark.parametrize("spec", [dense(592, 448, residual=True), dense(584, 1536)], ids=["whole", "parts"])
@pytest.mark.parametrize("m", [1, 13, 64, 200])
def test_every_tile_gives_the_same_bits(spec: LinearSpec, m: int) -> None:
    import torch

    given = arguments(spec, m, 1)
    facts = LINEAR.match(call(spec, m), cuda_target())
    space = LINEAR.space(facts, cuda_target())
    tiles = space[:: max(1, len(space) // 8)]
    results = []
    for run in runners([LINEAR.apply(facts, tile, cuda_target()) for tile in tiles]):
        results.append(run(*given)[0])
        torch.cuda.synchronize()
    different = [tile for tile, y in zip(tiles, results, strict=True) if not torch.equal(y, results[0])]
    assert not different


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec",
    [dense(584, 448, residual=True), gated(592, 448), dense(264, 1536, bias=True, out_dtype="float32")],
    ids=["residual", "gate", "float32-parts"],
)
@pytest.mark.parametrize("tokens", [32, 96, 128])
def test_halves_of_tiles_give_the_same_bits(spec: LinearSpec, tokens: int) -> None:
    """With fewer blocks than tiles. Some of the halves lie behind the last token."""
    import torch

    facts = LINEAR.match(call(spec, 2048), cuda_target())
    tile = LinearTile(64, tokens, 64, 3, 1)
    blocks = range(2, 12)
    run, *cut = runners(
        [LINEAR.apply(facts, replace(tile, blocks=b, halves=b > 1), cuda_target()) for b in (1, *blocks)]
    )
    for m in (tokens // 2, tokens + 3, 2 * tokens, 3 * tokens - 1):
        given = arguments(spec, m, m)
        (expected,) = run(*given)
        for count, halved in zip(blocks, cut, strict=True):
            (y,) = halved(*given)
            torch.cuda.synchronize()
            assert torch.equal(y, expected), f"{count} blocks, {m} tokens"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec",
    [
        gated(3072, 576),
        gated(208, 112, "gelu_tanh", bias=True),
        dense(576, 1536, residual=True),
        dense(1001, 256, "float16", bias=True, out_dtype="float32"),
        dense(200, 208, bias=True, residual=True),
        dense(960, 576, norm=NormSpec(576, 1e-5)),
        gated(3072, 576, norm=NormSpec(576, 1e-6)),
        dense(104, 1024, "float16", norm=NormSpec(1024, 1e-5)),
        dense(48, 112, norm=NormSpec(112, 1e-5)),
    ],
    ids=["gate_up", "odd-gate", "down", "float32", "odd", *[f"norm-{i}" for i in range(4)]],
)
def test_tiles_for_few_tokens_give_the_bits_of_those_for_many(spec: LinearSpec) -> None:
    """For activations of wild magnitudes, whose sums depend on the order of their terms as much as they can."""
    import torch

    facts = LINEAR.match(call(spec, 8), cuda_target())
    few = few_tiles(spec, 8)
    many = tiles(spec.out_features, spec.in_features, 8, cuda_target(), parts_of(spec))[0]
    assert few
    reference_run, *runs = runners([LINEAR.apply(facts, tile, cuda_target()) for tile in (many, *few)])
    assert [len(run.kernels) for run in runs] == [1] * len(few), "a norm is a kernel of its own"
    for m in (1, 3, 8):
        given = arguments(spec, m, seed=m)
        exponents = torch.randn(given[0].shape, generator=torch.Generator("cuda").manual_seed(m), device="cuda")
        given[0].mul_(torch.exp2(4 * exponents.clamp(-3, 3)).to(given[0].dtype))  # finite in float16, too
        (expected,) = reference_run(*given)
        torch.cuda.synchronize()
        for tile, run in zip(few, runs, strict=True):
            (y,) = run(*given)
            torch.cuda.synchronize()
            assert torch.equal(y, expected), f"{tile}, {m} tokens"


@pytest.mark.parametrize("spec", [dense(960, 576), gated(3072, 576)], ids=["qkv", "gate_up"])
def test_few_tokens_wait_for_no_weight(spec: LinearSpec) -> None:
    """All of a thread's weights are on their way before it waits for the kernel before."""
    (tile, *_) = few_tiles(spec, 8)
    run = CudaRunner(LINEAR.apply(LINEAR.match(call(spec, 8), cuda_target()), tile, cuda_target()))
    before, after = run.sass(0).split("ACQBULK")
    assert before.count("LDG.E.64") == 2 * spec.in_features // 16 // tile.warps
    assert "HMMA.16816" in after and "HMMA" not in before
    assert "STACK:0 " in run.resources(0)


def test_tiles_for_few_tokens_are_for_small_weights() -> None:
    assert [tile.warps for tile in few_tiles(dense(576, 576), 8)] == [3, 4, 6]
    assert [tile.warps for tile in few_tiles(dense(576, 1536), 8)] == [8], "each of four parts is too long for a warp"
    assert few_tiles(dense(576, 576), 9) == ()
    assert few_tiles(dense(6144, 4096), 1) == (), "the weight is too large"
    assert few_tiles(dense(64, 40), 1) == (), "K is no multiple of 16"
    assert few_tiles(dense(64, 37 * 16), 1) == (), "37 steps are too many for one warp, and no others share them"
    for warps in (0, 9):
        with pytest.raises(ValueError, match=f"{warps} warps"):
            LinearFewTile(warps)


def test_long_sums_of_small_weights_are_taken_in_parts() -> None:
    parts = [parts_of(dense(n, k)) for n, k in ((576, 1536), (2048, 2048), (576, 576), (2048, 8192), (576, 1100))]
    assert parts == [4, 4, 1, 1, 1]


@pytest.mark.parametrize("m", [1, 64, 2048])
@pytest.mark.parametrize("spec", [dense(4096, 4096, residual=True), gated(28672, 4096)], ids=["o", "gate_up"])
def test_matrix_units_and_tensor_copies_are_used(spec: LinearSpec, m: int) -> None:
    run = CudaRunner(lower(LINEAR, call(spec, m), cuda_target()))
    code = run.sass(0)
    assert "HGMMA" in code
    assert "UTMALDG" in code
    assert "LDL" not in code
    assert "FFMA" not in code, "a gate's product is contracted with what is added to it"
    assert "STACK:0 " in run.resources(0)


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    def reason(spec: LinearSpec, target: str = "nvidia-h100") -> str:
        rejected = LINEAR.match(call(spec, 8), RECORDS[target])
        assert isinstance(rejected, Reject)
        return rejected.reason

    assert "has no wgmma" in reason(dense(64, 64), "nvidia-a100")
    assert "are not rows of" in reason(replace(dense(64, 64), weight_format="f16_rows"))
    assert "16 bytes" in reason(dense(64, 63))
    assert "no multiple of 8" in reason(dense(63, 64))
    for more in ({"bias": True}, {"residual": True}, {"in_features": 1040}, {"out_features": 70000}):
        spec = replace(dense(64, 64, norm=NormSpec(64, 1e-5)), **more)
        assert "kernels of their own" in reason(spec), more
    assert "are not stored" in reason(dense(64, 64, out_dtype="float32", residual=True))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"rows": 24}, "no multiple of 16"),
        ({"tokens": 20}, "neither 8 nor a multiple of 16"),
        ({"depth": 96}, "depth 96"),
        ({"cluster": 2, "blocks": 3}, "not divided by clusters"),
        ({"rows": 256, "tokens": 256}, "registers"),
        ({"stages": 1}, "1 stages"),
        ({"halves": True, "tokens": 48}, "not cut in halves"),
        ({"halves": True, "cluster": 2}, "not cut in halves"),
    ],
)
def test_a_tile_checks_itself(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearTile(**({"rows": 64, "tokens": 64, "depth": 64, "stages": 4, "blocks": 132} | fields))


@pytest.mark.parametrize("m", [1, 16, 64, 128, 256, 2048])
@pytest.mark.parametrize("n,k", [(576, 576), (6144, 4096), (128256, 4096), (17, 8)])
def test_tiles_fit_in_shared_memory(n: int, k: int, m: int) -> None:
    space = tiles(n, k, m, cuda_target(), parts_of(dense(n, k)))
    assert space
    for tile in space:
        assert tile.shared_bytes * tile.blocks_per_sm <= cuda_target().shared_memory_bytes
