"""Attention of prompts over pages against torch in float64, with NaN wherever the kernel has no business to read."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from tvm.script import tirx as T

from tests.breadth import quick
from tests.cuda_runner import CudaRunner, cuda_target
from tests.schedules.cuda.paged_batches import with_sinks
from tests.tolerances import assert_close
from tilewright.compiler.composites import AttentionSpec, KVFormat, PagedAttentionSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import KernelCall, Lowering, Output
from tilewright.schedules.cuda.attention_prefill import PrefillTile, prefill_calls, prefill_space, refuse_prefill

LAYERS, LAYER = 2, 1
M_MAX = 4096
LEFT = 7.0  # what stands in the output before: rows of generated tokens keep it


def make_spec(heads=8, kv_heads=2, head_dim=128, page_size=16, dtype="bfloat16", **attention: Any):
    kv = KVFormat(LAYERS, kv_heads, head_dim, page_size, dtype, k_transposed=False)
    return PagedAttentionSpec(AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, **attention), kv, dtype)


def fill_kernel(spec: PagedAttentionSpec) -> KernelCall:
    """Stands for the kernel of generated tokens, which makes the output."""
    heads, dim, dtype = spec.attention.heads, spec.attention.head_dim, spec.dtype

    @T.prim_func
    def fill(q_handle: T.handle, out_handle: T.handle):
        t = T.int32()
        T.match_buffer(q_handle, (t, heads, dim), dtype)
        out = T.match_buffer(out_handle, (t, heads, dim), dtype)
        T.device_entry()
        row = T.cta_id([t])
        lane = T.thread_id([32])
        for head in T.serial(heads):
            for i in T.serial((dim + 31) // 32):
                if i * 32 + lane < dim:
                    out[row, head, i * 32 + lane] = T.Cast(dtype, T.float32(LEFT))

    return KernelCall(fill, (0,), (Output("out", ("m", heads, dim), dtype),))


def make_runner(spec: PagedAttentionSpec, tile: PrefillTile | None = None, m_max: int = M_MAX) -> CudaRunner:
    tile = tile or prefill_space(spec, cuda_target())[0]
    kernels = (fill_kernel(spec), *prefill_calls(spec, tile, cuda_target(), m_max))
    return CudaRunner(Lowering(kernels, ("out",)))


SPECS = {
    "4of1x128": make_spec(),
    "mha64-page1": make_spec(heads=3, kv_heads=3, head_dim=64, page_size=1),
    "9of3x64": make_spec(heads=9, kv_heads=3, head_dim=64, page_size=32),
    "8of1x80": make_spec(heads=8, kv_heads=1, head_dim=80, page_size=8),
    "256-window": make_spec(heads=4, kv_heads=1, head_dim=256, page_size=16, window=100),
    "128-window-cap": make_spec(heads=4, kv_heads=4, head_dim=128, page_size=64, window=37, soft_cap=20.0),
    "float16-page48": make_spec(heads=6, kv_heads=1, head_dim=96, page_size=48, dtype="float16"),
    "window1": make_spec(heads=71, kv_heads=1, head_dim=32, page_size=128, window=1),
    "cap": make_spec(heads=16, kv_heads=1, head_dim=48, page_size=3, soft_cap=2.5, dtype="float16"),
    "window-sinks": make_spec(heads=16, kv_heads=2, head_dim=64, window=128, sinks=True),
    "cap-sinks": make_spec(heads=6, kv_heads=2, head_dim=128, soft_cap=15.0, sinks=True),
    "192": make_spec(heads=2, kv_heads=1, head_dim=192, page_size=32),
}


@pytest.mark.parametrize("name", quick(("9of3x64", "cap-sinks", "256-window"), SPECS))
def test_compiles_without_local_memory(name: str) -> None:
    """Indices of the copying warps may lie on the stack; nothing of the main loop does."""
    run = make_runner(SPECS[name])
    for kernel in (1, 2):
        stack, local = re.search(r" STACK:(\d+) .* LOCAL:(\d+) ", run.resources(kernel)).groups()
        assert int(stack) <= 16 and int(local) == 0
    code = run.sass(2)
    assert "HGMMA" in code and "UTMALDG" in code
    softmax = code.split("gsb0, 0x1", 1)[1].split("gsb0, 0x0", 1)[0]
    assert "LDL" not in softmax and "STL" not in softmax


def test_softmax_runs_under_the_values_product() -> None:
    """Between the wait for scores and the wait for values in the main loop stand the exponentials."""
    lines = make_runner(SPECS["4of1x128"]).sass(2).split("gsb0, 0x1", 1)[1].split("gsb0, 0x0", 1)[0]
    assert lines.count("MUFU.EX2") == 64 + 2


def test_all_tiles_fit() -> None:
    for spec in SPECS.values():
        for target in RECORDS.values():
            if refuse_prefill(spec, target) is None:
                tiles = prefill_space(spec, target)
                assert tiles and all(tile.fits(spec.attention.head_dim, target) for tile in tiles)
                assert len({tile.keys for tile in tiles}) == 1  # others would give other bits


def test_heads_fill_a_tile() -> None:
    for group, heads, tokens in [(1, 1, 128), (3, 3, 42), (4, 4, 32), (7, 7, 18), (16, 16, 8), (71, 1, 128)]:
        tile = prefill_space(make_spec(heads=group, kv_heads=1), cuda_target())[0]
        assert (tile.heads, tile.tokens) == (heads, tokens)


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
    ],
)
def test_refuses_with_a_reason(spec: PagedAttentionSpec, reason: str) -> None:
    rejected = refuse_prefill(spec, cuda_target())
    assert rejected is not None and reason in rejected.reason


def test_refuses_targets_and_layouts() -> None:
    refused = refuse_prefill(make_spec(), RECORDS["nvidia-a100"])
    assert refused is not None and "nvidia-a100 has no TMA and no wgmma" in refused.reason
    transposed = dataclasses.replace(make_spec(), kv=dataclasses.replace(make_spec().kv, k_transposed=True))
    refused = refuse_prefill(transposed, cuda_target())
    assert refused is not None and "keys are stored [dim, slot]" in refused.reason
    assert refuse_prefill(make_spec(), cuda_target()) is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"warpgroups": 4}, "warpgroups 4 is not within 1..3"),
        ({"heads": 129}, "heads 129 is not within 1..128"),
        ({"keys": 48}, "keys 48 is not a power of two"),
        ({"stages": 0}, "stages 0"),
    ],
)
def test_tiles_check_themselves(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefillTile(**{"heads": 4, **fields})


def test_a_tile_holds_an_equal_part_of_a_group() -> None:
    with pytest.raises(ValueError, match="heads 3 of a tile do not divide the 4 query heads"):
        prefill_calls(make_spec(), PrefillTile(heads=3), cuda_target(), M_MAX)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@dataclasses.dataclass
class Batch:
    """Sequences of `lengths` cached tokens, of which the last `new` are queries. Tensors are on the GPU."""

    q: Any
    pages: Any
    positions: np.ndarray
    indptr: np.ndarray
    page_indptr: np.ndarray
    page_indices: np.ndarray
    kv_len: np.ndarray
    phases: np.ndarray
    k: list[Any]  # per sequence [length, G, D]
    v: list[Any]
    sinks: Any  # float32[H], where the spec has them

    def arguments(self) -> tuple[Any, ...]:
        import torch

        tables = (self.positions, self.indptr, self.page_indptr, self.page_indices, self.kv_len, self.phases)
        return (
            self.q,
            self.pages,
            *(torch.from_numpy(np.ascontiguousarray(a, np.int32)).cuda() for a in tables),
            LAYER,
            *([] if self.sinks is None else [self.sinks]),
        )

    def cut(self, sequence: int, begin: int, end: int) -> "Batch":
        """Queries begin..end of one sequence, whose cache ends with the last of them."""
        first = int(self.indptr[sequence])
        rows = slice(first + begin, first + end)
        length = self.positions[rows.stop - 1] + 1
        entries = self.page_indices[self.page_indptr[sequence] : self.page_indptr[sequence + 1]]
        tables = (np.array([0, end - begin]), np.array([0, len(entries)]), entries)
        counts = (np.array([length]), np.array([0]))
        return Batch(self.q[rows].clone(), self.pages, self.positions[rows], *tables, *counts, [], [], self.sinks)


def make_batch(spec: PagedAttentionSpec, lengths, new, phases=None) -> Batch:
    """Pages in random order; every slot that holds no token is NaN, and so is every other layer."""
    import torch

    seed = int(np.random.default_rng().integers(2**31))
    print(f"{seed=}")
    rng, generator = np.random.default_rng(seed), torch.Generator("cuda").manual_seed(seed)
    kv, dtype = spec.kv, getattr(torch, spec.dtype)
    normal = {"generator": generator, "device": "cuda", "dtype": dtype}
    counts = [-(-n // kv.page_size) for n in lengths]
    order = rng.permutation(sum(counts) + 3)
    page_indptr = np.cumsum([0, *counts])
    shape = (kv.layers, len(order), 2, kv.kv_heads, kv.page_size, kv.head_dim)
    pages = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
    keys, values = [], []
    for s, length in enumerate(lengths):
        k, v = (torch.randn(length, kv.kv_heads, kv.head_dim, **normal) for _ in range(2))
        token = np.arange(length)
        page = torch.from_numpy(order[page_indptr[s] + token // kv.page_size]).cuda()
        slot = torch.from_numpy(token % kv.page_size).cuda()
        pages[LAYER, page, 0, :, slot], pages[LAYER, page, 1, :, slot] = k, v
        keys.append(k)
        values.append(v)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, new, strict=True)])
    q = torch.randn(len(positions), spec.attention.heads, kv.head_dim, **normal) * 2
    entries = np.concatenate([order[: page_indptr[-1]], [2**30]])  # the table may be longer than used
    phases = np.zeros(len(lengths)) if phases is None else np.array(phases)
    indptr, kv_len = np.cumsum([0, *new]), np.array(lengths)
    pages = pages.reshape(*shape[:-2], -1)
    sinks = None
    if spec.attention.sinks:
        sinks = torch.randn(spec.attention.heads, generator=generator, device="cuda") * 3
    return Batch(q, pages, positions, indptr, page_indptr, entries, kv_len, phases, keys, values, sinks)


def reference(spec: PagedAttentionSpec, batch: Batch) -> np.ndarray:
    import torch

    attention = spec.attention
    group = attention.heads // attention.kv_heads
    out = torch.full(batch.q.shape, LEFT, dtype=torch.float64, device="cuda")
    for s in np.flatnonzero(batch.phases == 0):
        rows = slice(batch.indptr[s], batch.indptr[s + 1])
        q = batch.q[rows].double().transpose(0, 1)
        k, v = (x[s].double().transpose(0, 1).repeat_interleave(group, 0) for x in (batch.k, batch.v))
        score = q @ k.transpose(1, 2) * attention.scale
        if attention.soft_cap is not None:
            score = attention.soft_cap * torch.tanh(score / attention.soft_cap)
        at = torch.from_numpy(batch.positions[rows]).cuda()[:, None]
        key = torch.arange(k.shape[1], device="cuda")
        hidden = key > at
        if attention.window is not None:
            hidden |= key <= at - attention.window
        score = score.masked_fill(hidden, float("-inf"))
        weights = score.softmax(-1) if batch.sinks is None else with_sinks(score, batch.sinks)
        out[rows] = (weights @ v).transpose(0, 1)
    return out.cpu().numpy()


def check(spec: PagedAttentionSpec, run: CudaRunner, batch: Batch) -> None:
    (out,) = run(*batch.arguments())
    assert_close(out.double().cpu().numpy(), reference(spec, batch), spec.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_torch(spec: PagedAttentionSpec) -> None:
    run = make_runner(spec)
    for lengths, new, phases in [
        ([1], [1], [0]),
        ([129], [129], [0]),
        ([17, 300, 1, 64, 700, 33], [17, 40, 1, 64, 1, 33], [0, 0, 1, 0, 1, 0]),
        ([1030, 5, 128, 257], [515, 0, 128, 1], [0, 0, 1, 0]),
    ]:
        check(spec, run, make_batch(spec, lengths, new, phases))


@pytest.mark.gpu
def test_every_tile_is_right() -> None:
    spec = make_spec(heads=6, head_dim=64)
    batch = make_batch(spec, [300, 70, 4], [200, 70, 1])
    tiles = [PrefillTile(1, warpgroups=3), PrefillTile(3, keys=64, stages=3), PrefillTile(3, 128, 1, 1, 1)]
    for tile in tiles:
        check(spec, make_runner(spec, tile), batch)


@pytest.mark.gpu
def test_many_sequences() -> None:
    """More tiles than thread blocks take in a turn, and sequences of all lengths."""
    spec = make_spec(heads=12, kv_heads=4, head_dim=64)
    rng = np.random.default_rng()
    new = rng.integers(1, 12, 300)
    lengths = new + rng.integers(0, 90, 300) * rng.integers(0, 2, 300)
    check(spec, make_runner(spec), make_batch(spec, lengths.tolist(), new.tolist(), rng.integers(0, 2, 300)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["4of1x128", "256-window", "cap"])
def test_a_row_has_the_same_bits_in_every_batch_and_chunk(name: str) -> None:
    import torch

    spec = SPECS[name]
    run = make_runner(spec)
    whole = make_batch(spec, [333, 77, 1, 140], [333, 77, 1, 140])
    (expected,) = run(*whole.arguments())
    assert not expected.isnan().any()
    for chunk in (1, 7, 64, 333):
        for s, length in enumerate(whole.kv_len):
            for begin in range(0, length, chunk):
                end = min(begin + chunk, length)
                (alone,) = run(*whole.cut(s, begin, end).arguments())
                assert torch.equal(alone, expected[whole.indptr[s] + begin : whole.indptr[s] + end])


@pytest.mark.gpu
def test_what_the_next_kernel_reads_is_there() -> None:
    """The same call many times in a graph, each behind the other."""
    import torch

    spec = SPECS["4of1x128"]
    batch = make_batch(spec, [500, 90], [500, 90])
    launch, (out,) = make_runner(spec).bind(*batch.arguments())
    launch()
    expected, stream, graph = out.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(20):
            launch()
    for _ in range(5):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
