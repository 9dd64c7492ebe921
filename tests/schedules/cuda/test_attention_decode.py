"""Decode attention against torch, with NaN wherever a kernel has no business to read; bits against bits."""

import dataclasses
from typing import Any

import pytest

from tests.breadth import quick
from tests.cuda_runner import CudaRunner, cuda_target
from tests.kernel_runner import lower
from tests.schedules.cuda.paged_batches import expected, make_batch, make_spec
from tests.tolerances import assert_close
from tilewright.compiler.composites import KVFormat, PagedAttentionSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cuda.attention_decode import DecodeTile
from tilewright.schedules.cuda.decode_plan import MODES
from tilewright.schedules.cuda.decode_work import COUNTERS, PARTS, WORK
from tilewright.schedules.cuda.paged_attention import PagedAttention, Tile

SPECS = {
    "9of3x64": make_spec(9, 3, 64),
    "32of8x128": make_spec(32, 8, 128),
    "mha48-page32": make_spec(4, 4, 48, 32),
    "8of1x80-cap": make_spec(8, 1, 80, 16, soft_cap=2.5),
    "8of2x128-window-page1": make_spec(8, 2, 128, 1, window=200),
    "14of2x64-page64": make_spec(14, 2, 64, 64),
    "16of1x96-page48": make_spec(16, 1, 96, 48),
    "8of1x256-window-cap": make_spec(8, 1, 256, 32, window=1000, soft_cap=30.0),
    "5of1x32-float16-page3": make_spec(5, 1, 32, 3, "float16"),
    "4of1x128-float16": make_spec(4, 1, 128, 16, "float16"),
    "16of2x64-window-sinks": make_spec(16, 2, 64, 16, window=128, sinks=True),
    "6of2x128-cap-sinks": make_spec(6, 2, 128, 16, soft_cap=15.0, sinks=True),
}
RAGGED = [1, 15, 16, 17, 127, 128, 129, 0, 511, 512, 513, 1000, 4097, 33]
LONG = [9000, 1]


MOST = 16  # sequences of a batch


def call_of(spec: PagedAttentionSpec) -> Call:
    return Call("paged_attention", spec, MOST, MOST, decode=True)


def runner(spec: PagedAttentionSpec, **tile: Any) -> CudaRunner:
    """For any batch of up to MOST sequences of one generated token each."""
    default = PagedAttention().space(PagedAttention().match(call_of(spec), cuda_target()), cuda_target())[0]
    chosen = Tile(dataclasses.replace(default.decode, **tile), None)
    return CudaRunner(lower(PagedAttention(), call_of(spec), cuda_target(), chosen))


@pytest.mark.parametrize("name", quick(("32of8x128", "8of1x256-window-cap"), SPECS))
def test_compiles_into_registers(name: str) -> None:
    run = runner(SPECS[name])
    for kernel in (0, 1):
        assert "LOCAL:0" in run.resources(kernel) and "STACK:0 " in run.resources(kernel)
    sass = run.sass(1)
    assert "UTMALDG" in sass and "HMMA" in sass and "ACQBULK" in sass and "PREEXIT" in sass


@pytest.mark.parametrize(
    "spec, target, reason",
    [
        (make_spec(head_dim=40), "nvidia-h100", "head size 40"),
        (make_spec(head_dim=272), "nvidia-h100", "head size 272"),
        (make_spec(), "nvidia-a100", "nvidia-a100 has no TMA"),
        (make_spec(causal=False), "nvidia-h100", "only causal attention"),
        (make_spec(window=0), "nvidia-h100", "a window of 0 keys"),
        (make_spec(7, 2), "nvidia-h100", "7 query heads"),
        (make_spec(dtype="float32"), "nvidia-h100", "queries of float32 over pages of float32"),
        (dataclasses.replace(make_spec(), kv=KVFormat(2, 2, 64, 16, "bfloat16")), "nvidia-h100", "k_transposed"),
    ],
)
def test_rejects_with_a_reason(spec: PagedAttentionSpec, target: str, reason: str) -> None:
    rejected = PagedAttention().match(call_of(spec), RECORDS[target])
    assert isinstance(rejected, Reject) and reason in rejected.reason


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"stages": 1}, "stages 1 is below 2"),
        ({"blocks_per_sm": 3}, "blocks_per_sm 3"),
        ({"mode": "half"}, "mode 'half'"),
        ({"share": 0.0}, "share 0.0"),
    ],
)
def test_a_tile_checks_itself(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DecodeTile(**{"stages": 3, "blocks_per_sm": 2, **fields})


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_tiles_fit(spec: PagedAttentionSpec) -> None:
    facts = PagedAttention().match(call_of(spec), cuda_target())
    tiles = PagedAttention().space(facts, cuda_target())
    assert tiles and all(tile.decode.fits(spec, cuda_target()) for tile in tiles)


def test_floor_counts_queries_and_outputs() -> None:
    spec = make_spec(9, 3, 64)
    floor = PagedAttention().floor(PagedAttention().match(call_of(spec), cuda_target()), cuda_target())
    assert floor.bytes_per_row == 2 * 9 * 64 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_torch(spec: PagedAttentionSpec) -> None:
    import torch

    print(f"seed={torch.seed()}")
    run = runner(spec)
    for lengths in (RAGGED, LONG, [1]):
        batch = make_batch(spec, lengths)
        (out,) = run(*batch.arguments())
        used = [s for s, n in enumerate(lengths) if n]
        assert_close(out[used].double().cpu(), expected(batch)[used].cpu(), spec.dtype)
        padding = [s for s, n in enumerate(lengths) if not n]
        assert out[padding].isnan().all()  # nothing writes there


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["9of3x64", "32of8x128", "8of2x128-window-page1", "16of1x96-page48"])
def test_bits_depend_on_nothing_else(name: str) -> None:
    """Not on how queries are cut, on stages and blocks, or on the other queries."""
    import torch

    print(f"seed={torch.seed()}")
    spec, lengths = SPECS[name], [*RAGGED, 9000]
    used = [s for s, n in enumerate(lengths) if n]
    batch, run = make_batch(spec, lengths), runner(spec)
    (out,) = run(*batch.arguments())
    for tile in [*({"mode": mode} for mode in MODES), {"stages": 2}, {"blocks_per_sm": 1, "stages": 3}]:
        (other,) = runner(spec, **tile)(*batch.arguments())
        assert torch.equal(other[used], out[used]), tile
    for s in (0, 6, 11, len(lengths) - 1):
        (alone,) = run(*batch.arguments(chosen=[s]))
        assert torch.equal(alone[0], out[s]), s


@pytest.mark.gpu
def test_page_size_changes_no_bit() -> None:
    import torch

    spec, lengths = make_spec(8, 2, 128, 16), [700, 5, 130]
    batch = make_batch(spec, lengths)
    (out,) = runner(spec)(*batch.arguments())
    for page_size in (1, 3, 8, 64, 80):
        other_spec = make_spec(8, 2, 128, page_size)
        other = make_batch(other_spec, lengths)
        slots = other.pages.view(*other.pages.shape[:4], page_size, 128)
        for s, length in enumerate(lengths):
            at = torch.arange(length, device="cuda")
            page = other.page_indices[other.first_pages[s] + at // page_size].long()
            slots[1, page, 0, :, at % page_size] = batch.k[s]
            slots[1, page, 1, :, at % page_size] = batch.v[s]
        other.q = batch.q
        (result,) = runner(other_spec)(*other.arguments())
        assert torch.equal(result, out), page_size


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", "split"])
def test_counters_are_left_at_zero(mode: str) -> None:
    """One plan serves all layers: the decode kernel runs again and again after it."""
    import torch

    spec, lengths = SPECS["32of8x128"], [5000, 300, 0, 20]
    run = runner(spec, mode=mode)
    run.lowering = dataclasses.replace(run.lowering, results=("out", WORK, COUNTERS))
    batch = make_batch(spec, lengths)
    launch, (out, work, counters) = run.bind(*batch.arguments())
    launch()
    before = out.clone()
    assert work[0, 0] > 4 and (work[1 : 1 + int(work[0, 0]), PARTS] > 1).any()  # some query is cut
    for _ in range(3):
        out.fill_(float("nan"))
        launch()
        assert not counters.any()
        assert torch.equal(out[[0, 1, 3]], before[[0, 1, 3]])
