"""Attention over pages against numpy, with NaN wherever a kernel has no business to read."""

import dataclasses

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, aligned_empty, host_target, lower
from tests.tolerances import assert_close
from tilewright.compiler.composites import AttentionSpec, KVFormat, PagedAttentionSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu.paged_attention import PagedAttention, Tile

LAYERS = 2
DECODING = [33, 1, 64, 65, 129, 20, 200, 16]  # lengths about the edges of runs and blocks


@dataclasses.dataclass
class Batch:
    """Sequences of `lengths` cached tokens, of which the last `new` are queries."""

    q: np.ndarray
    pages: np.ndarray
    positions: np.ndarray
    indptr: np.ndarray
    page_indptr: np.ndarray
    page_indices: np.ndarray
    kv_len: np.ndarray
    k: list[np.ndarray]  # per sequence [length, G, D]
    v: list[np.ndarray]

    def arguments(self, layer: int) -> tuple:
        tables = (self.positions, self.indptr, self.page_indptr, self.page_indices, self.kv_len)
        return (self.q, self.pages, *tables, np.zeros_like(self.kv_len), layer)


def make_spec(heads=6, kv_heads=2, head_dim=64, page_size=16, dtype="float32", **attention) -> PagedAttentionSpec:
    kv = KVFormat(LAYERS, kv_heads, head_dim, page_size, dtype)
    return PagedAttentionSpec(AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, **attention), kv)


def make_batch(spec: PagedAttentionSpec, lengths, new, rng, layer=1) -> Batch:
    """Pages in random order; every slot that holds no token is NaN, and so is every other layer."""
    kv, heads = spec.kv, spec.attention.heads
    counts = [-(-n // kv.page_size) for n in lengths]
    order = rng.permutation(sum(counts) + 3).astype(np.int32)
    page_indptr = np.cumsum([0, *counts]).astype(np.int32)
    pages = aligned_empty((kv.layers, len(order), 2, kv.kv_heads, kv.page_size * kv.head_dim), kv.dtype)
    keys, values = [], []
    for s, length in enumerate(lengths):
        k, v = rng.standard_normal((2, length, kv.kv_heads, kv.head_dim)).astype(kv.dtype)
        for t in range(length):
            page = pages[layer, order[page_indptr[s] + t // kv.page_size]]
            page[0].reshape(kv.kv_heads, kv.head_dim, kv.page_size)[:, :, t % kv.page_size] = k[t]
            page[1].reshape(kv.kv_heads, kv.page_size, kv.head_dim)[:, t % kv.page_size] = v[t]
        keys.append(k)
        values.append(v)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, new, strict=True)]).astype(np.int32)
    q = rng.standard_normal((len(positions), heads, kv.head_dim)).astype(np.float32) * 2
    indptr = np.cumsum([0, *new]).astype(np.int32)
    entries = np.concatenate([order[: page_indptr[-1]], [2**30]]).astype(np.int32)  # the table may be longer than used
    return Batch(q, pages, positions, indptr, page_indptr, entries, np.array(lengths, np.int32), keys, values)


def reference(spec: PagedAttentionSpec, batch: Batch) -> np.ndarray:
    attention = spec.attention
    group = attention.heads // attention.kv_heads
    out = np.zeros(batch.q.shape)
    for s in range(len(batch.kv_len)):
        for row in range(batch.indptr[s], batch.indptr[s + 1]):
            at = batch.positions[row]
            oldest = 0 if attention.window is None else max(0, at - attention.window + 1)
            k = np.repeat(batch.k[s][oldest : at + 1].astype(np.float64), group, 1)
            v = np.repeat(batch.v[s][oldest : at + 1].astype(np.float64), group, 1)
            score = np.einsum("hd,jhd->hj", batch.q[row].astype(np.float64), k) * attention.scale
            if attention.soft_cap is not None:
                score = attention.soft_cap * np.tanh(score / attention.soft_cap)
            weight = np.exp(score - score.max(-1, keepdims=True))
            out[row] = np.einsum("hj,jhd->hd", weight / weight.sum(-1, keepdims=True), v)
    return out


def compile_kernel(spec: PagedAttentionSpec, tile: Tile | None = None) -> KernelRunner:
    return KernelRunner(lower(PagedAttention(), Call("paged_attention", spec, None, 512), tile=tile))


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(heads=9, kv_heads=3, head_dim=64),
        make_spec(heads=4, kv_heads=4, head_dim=48, page_size=32),
        make_spec(heads=8, kv_heads=1, head_dim=80, soft_cap=2.5),
        make_spec(heads=4, kv_heads=2, head_dim=128, window=37),
        make_spec(heads=4, kv_heads=1, head_dim=256, page_size=48, window=100, soft_cap=30.0),
        make_spec(heads=16, kv_heads=1, head_dim=8, window=1),
        make_spec(heads=5, kv_heads=1, head_dim=40, page_size=64),
        make_spec(heads=6, kv_heads=2, head_dim=32, dtype="float16"),
    ],
    ids=["9of3x64", "mha48", "8of1x80-cap", "4of2x128-window", "256-window-cap", "16of1x8", "5of1x40", "float16"],
)
def test_matches_numpy(spec: PagedAttentionSpec) -> None:
    rng = np.random.default_rng()
    run = compile_kernel(spec)
    for lengths, new in [
        ([1], [1]),
        ([17], [17]),
        ([1, 300, 64, 65], [1, 40, 1, 1]),
        ([130, 5, 16], [30, 0, 16]),
        (DECODING, [1] * 8),
    ]:
        batch = make_batch(spec, lengths, new, rng)
        (out,) = run(*batch.arguments(layer=1))
        assert_close(out, reference(spec, batch))


@pytest.mark.parametrize("window", [None, 50])
def test_a_row_has_the_same_bits_in_every_batch_and_chunk(window: int | None) -> None:
    rng = np.random.default_rng()
    spec = make_spec(heads=9, kv_heads=3, head_dim=64, window=window)
    run = compile_kernel(spec)
    whole = make_batch(spec, [219, 77, 1], [219, 77, 1], rng)
    (expected,) = run(*whole.arguments(1))
    for chunk in (1, 7, 64):
        for s, length in enumerate(whole.kv_len):
            for begin in range(0, length, chunk):
                rows = slice(whole.indptr[s] + begin, whole.indptr[s] + min(begin + chunk, length))
                pages = whole.page_indices[whole.page_indptr[s] : whole.page_indptr[s + 1]].copy()
                indptr, page_indptr = np.array([0, rows.stop - rows.start]), np.array([0, len(pages)])
                lists = (indptr.astype(np.int32), page_indptr.astype(np.int32), pages)
                tables = (*lists, whole.kv_len[s : s + 1].copy(), np.zeros(1, np.int32))
                arguments = (whole.q[rows].copy(), whole.pages, whole.positions[rows].copy(), *tables, 1)
                np.testing.assert_array_equal(run(*arguments)[0], expected[rows])


def test_a_decoding_row_has_the_same_bits_alone() -> None:
    rng = np.random.default_rng()
    spec = make_spec(heads=9, kv_heads=3, head_dim=64)
    run = compile_kernel(spec)
    whole = make_batch(spec, DECODING, [1] * len(DECODING), rng)
    (expected,) = run(*whole.arguments(1))
    for s, length in enumerate(whole.kv_len):
        pages = whole.page_indices[whole.page_indptr[s] : whole.page_indptr[s + 1]].copy()
        indptr, page_indptr = np.array([0, 1], np.int32), np.array([0, len(pages)], np.int32)
        tables = (indptr, page_indptr, pages, np.array([length], np.int32), np.ones(1, np.int32))
        (alone,) = run(whole.q[s : s + 1].copy(), whole.pages, whole.positions[s : s + 1].copy(), *tables, 1)
        np.testing.assert_array_equal(alone[0], expected[s])


def test_narrower_vectors_give_the_same_bits() -> None:
    """The same kernel for AVX2: LLVM splits the vectors, the arithmetic stays."""
    rng = np.random.default_rng()
    spec = make_spec(heads=6, kv_heads=2, head_dim=40, window=90, soft_cap=20.0)
    batch = make_batch(spec, [150, 3], [70, 3], rng)
    narrow = Target("avx2", "cpu", "x86_64", ("avx2", "fma", "f16c"), "x86-64-v3")
    lowering = lower(PagedAttention(), Call("paged_attention", spec, None, 512), narrow)
    (expected,) = compile_kernel(spec)(*batch.arguments(1))
    np.testing.assert_array_equal(KernelRunner(lowering, narrow)(*batch.arguments(1))[0], expected)


def test_every_tile_is_right_and_gives_the_same_bits() -> None:
    rng = np.random.default_rng()
    spec = make_spec(heads=6, kv_heads=2, head_dim=48)
    batch = make_batch(spec, [150, 3], [70, 3], rng)
    facts = PagedAttention().match(Call("paged_attention", spec, None, 64), host_target())
    first, *others = [compile_kernel(spec, tile) for tile in PagedAttention().space(facts, host_target())]
    (expected,) = first(*batch.arguments(1))
    assert_close(expected, reference(spec, batch))
    assert others
    for run in others:
        np.testing.assert_array_equal(run(*batch.arguments(1))[0], expected)


def test_rows_that_pad_a_step_are_zero() -> None:
    rng = np.random.default_rng()
    spec = make_spec()
    batch = make_batch(spec, [20], [5], rng)
    padded = dataclasses.replace(
        batch,
        q=np.concatenate([batch.q, np.full((3, *batch.q.shape[1:]), np.nan, np.float32)]),
        positions=np.concatenate([batch.positions, [2**30] * 3]).astype(np.int32),
    )
    (out,) = compile_kernel(spec)(*padded.arguments(1))
    assert_close(out[:5], reference(spec, batch))
    assert (out[5:] == 0).all()


@pytest.mark.parametrize(
    "spec, reason",
    [
        (make_spec(page_size=8), "page size 8 is not a multiple of 16"),
        (make_spec(head_dim=20), "head size 20 is not a multiple of 8"),
        (make_spec(sinks=True), "only causal attention without sinks"),
        (make_spec(dtype="int8"), "pages of int8"),
    ],
)
def test_rejects_with_a_reason(spec: PagedAttentionSpec, reason: str) -> None:
    rejected = PagedAttention().match(Call("paged_attention", spec, None, 8), host_target())
    assert isinstance(rejected, Reject) and reason in rejected.reason


def test_tiles_check_themselves() -> None:
    with pytest.raises(ValueError, match="rows 13"):
        Tile(rows=13, tokens=8)
    with pytest.raises(ValueError, match="tokens 0"):
        Tile(rows=12, tokens=0)


def test_floor_counts_queries_and_outputs() -> None:
    spec = make_spec(heads=9, kv_heads=3, head_dim=64)
    facts = PagedAttention().match(Call("paged_attention", spec, None, 8), host_target())
    assert PagedAttention().floor(facts, host_target()).bytes_per_row == 2 * 4 * 9 * 64
