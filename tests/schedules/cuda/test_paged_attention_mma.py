"""Attention without TMA and wgmma against torch in float64, with NaN wherever the kernel has no business to read."""

import dataclasses
import re

import numpy as np
import pytest

from tests.breadth import quick
from tests.cuda_runner import CudaRunner, cuda_target
from tests.kernel_runner import lower
from tests.schedules.cuda import paged_batches
from tests.schedules.cuda.test_attention_prefill import SPECS, check, make_batch, make_spec
from tests.tolerances import assert_close
from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.compiler.targets import RECORDS
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cuda.attention_mma import AttentionMmaTile
from tilewright.schedules.cuda.paged_attention_mma import PagedAttentionMma

ATTENTION = PagedAttentionMma()
OLDER = ("nvidia-a100", "nvidia-l40s", "nvidia-rtx-4090")


def make_runner(spec: PagedAttentionSpec, decode: bool = False, target: Target | None = None) -> CudaRunner:
    """decode: for steps of one token for each sequence, any number of them."""
    target = target or cuda_target()
    return CudaRunner(lower(ATTENTION, Call("paged_attention", spec, None, 4096, decode=decode), target), target)


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    "name, target",
    quick(
        [
            ("4of1x128", "nvidia-a100"),
            ("cap-sinks", "nvidia-a100"),
            ("192", "nvidia-a100"),
            ("256-window", "nvidia-l40s"),
        ],
        [*((name, "nvidia-a100") for name in SPECS), ("4of1x128", "nvidia-l40s"), ("256-window", "nvidia-l40s")],
    ),
)
def test_compiles_without_local_memory(name: str, target: str, decode: bool) -> None:
    """What is used once may lie on the stack where a head takes all registers; nothing of the main loop does."""
    spec = SPECS[name]
    run = make_runner(spec, decode, RECORDS[target])
    found = re.search(r" STACK:(\d+) .* LOCAL:(\d+) ", run.resources(0))
    assert found is not None
    assert int(found[1]) <= (16 if spec.attention.head_dim == 256 else 0) and int(found[2]) == 0
    code = run.sass(0)
    assert "LDGSTS" in code and "LDSM" in code
    loop = code[code.index("HMMA.16816.F32") : code.rindex("HMMA.16816.F32")]
    assert "LDL" not in loop and "STL" not in loop


def test_compiles_for_hopper() -> None:
    assert "ACQBULK" in make_runner(SPECS["4of1x128"]).sass(0)  # griddepcontrol.wait


@pytest.mark.parametrize("target", ["nvidia-h100", *OLDER])
@pytest.mark.parametrize("head_dim", range(32, 257, 16))
def test_tiles_fit(head_dim: int, target: str) -> None:
    record = RECORDS[target]
    facts = ATTENTION.match(Call("paged_attention", make_spec(head_dim=head_dim), None, 64), record)
    tiles = ATTENTION.space(facts, record)
    assert tiles and all(tile.fits(head_dim, record) for tile in tiles)
    assert len({tile.keys for tile in tiles}) == 1  # others would give other bits


@pytest.mark.parametrize(
    "spec, reason",
    [
        (make_spec(causal=False), "only causal attention"),
        (make_spec(head_dim=40), "head size 40 is not a multiple of 16"),
        (make_spec(head_dim=512), "head size 512 is not a multiple of 16 within 32..256"),
        (make_spec(dtype="float32"), "queries of float32 over pages of float32"),
        (dataclasses.replace(make_spec(), dtype="float16"), "queries of float16 over pages of bfloat16"),
        (make_spec(heads=7, kv_heads=2), "7 query heads are not a multiple of 2 KV heads"),
        (make_spec(window=0), "a window of 0 keys"),
        (
            dataclasses.replace(make_spec(), kv=dataclasses.replace(make_spec().kv, k_transposed=True)),
            "keys are stored [dim, slot]",
        ),
    ],
)
def test_refuses_with_a_reason(spec: PagedAttentionSpec, reason: str) -> None:
    rejected = ATTENTION.match(Call("paged_attention", spec, None, 64), RECORDS["nvidia-a100"])
    assert isinstance(rejected, Reject) and reason in rejected.reason


@pytest.mark.parametrize("fields, message", [({"keys": 48}, "keys 48"), ({"blocks_per_sm": 3}, "blocks_per_sm 3")])
def test_tiles_check_themselves(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMmaTile(**{"keys": 64, **fields})


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_torch(spec: PagedAttentionSpec) -> None:
    run = make_runner(spec)
    for lengths, new in [
        ([1], [1]),
        ([129], [129]),
        ([17, 300, 1, 64, 700, 33], [17, 40, 1, 64, 1, 33]),
        ([1030, 5, 128, 257], [515, 0, 128, 1]),
    ]:
        check(spec, run, make_batch(spec, lengths, new))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_generated_tokens_match_torch(spec: PagedAttentionSpec) -> None:
    """Of steps that have no others, and the same bits as in steps that may; keys before the window are NaN."""
    import torch

    seed = int(np.random.default_rng().integers(2**31))
    print(f"{seed=}")
    torch.manual_seed(seed)
    single, mixed = make_runner(spec, decode=True), make_runner(spec)
    for lengths in ([1], [700], [0, 5, 64, 65, 1000, 1, 0, 129]):
        batch = paged_batches.make_batch(spec, lengths)
        (out,), (same,) = single(*batch.arguments()), mixed(*batch.arguments())
        real = [s for s, length in enumerate(lengths) if length]
        expected = paged_batches.expected(batch)[real].cpu().numpy()
        assert_close(out[real].double().cpu().numpy(), expected, spec.dtype)
        assert torch.equal(out[real], same[real])


@pytest.mark.gpu
def test_many_sequences() -> None:
    """More than a warp counts at a time, some of them without tokens."""
    spec = make_spec(heads=12, kv_heads=4, head_dim=64)
    rng = np.random.default_rng()
    new = rng.integers(0, 40, 300)
    lengths = new + 1 + rng.integers(0, 90, 300) * rng.integers(0, 2, 300)
    check(spec, make_runner(spec), make_batch(spec, lengths.tolist(), new.tolist()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["4of1x128", "256-window", "cap"])
def test_a_row_has_the_same_bits_in_every_batch_and_chunk(name: str) -> None:
    import torch

    spec = SPECS[name]
    run = make_runner(spec)
    whole = make_batch(spec, [333, 77, 1, 140], [333, 77, 1, 140])
    (expected,) = run(*whole.arguments())
    assert not expected.isnan().any()
    single = make_runner(spec, decode=True)
    for chunk in (1, 7, 64, 333):
        for s, length in enumerate(whole.kv_len):
            for begin in range(0, length, chunk):
                end = min(begin + chunk, length)
                arguments = whole.cut(s, begin, end).arguments()
                for one in (run, single) if chunk == 1 else (run,):
                    (alone,) = one(*arguments)
                    assert torch.equal(alone, expected[whole.indptr[s] + begin : whole.indptr[s] + end])


@pytest.mark.gpu
def test_what_the_next_kernel_reads_is_there() -> None:
    """The same call many times in a graph, each behind the other."""
    import torch

    spec = SPECS["4of1x128"]
    batch = make_batch(spec, [500, 90], [500, 90])
    launch, (out,) = make_runner(spec).bind(*batch.arguments())
    launch()
    torch.cuda.synchronize()
    expected, stream, graph = out.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(20):
            launch()
    for _ in range(5):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
