"""Batches of generated tokens over poisoned pages on a GPU, and their attention in torch: for the tests of decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.compiler.composites import AttentionSpec, KVFormat, PagedAttentionSpec

LAYERS = 2


def make_spec(
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: str = "bfloat16",
    **attention: Any,
) -> PagedAttentionSpec:
    kv = KVFormat(LAYERS, kv_heads, head_dim, page_size, dtype, k_transposed=False)
    return PagedAttentionSpec(AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, **attention), kv, dtype)


@dataclass
class Batch:
    """One query for each of the sequences of `lengths` cached keys; 0 pads the step."""

    spec: PagedAttentionSpec
    lengths: Sequence[int]
    q: Any  # [b, H, D]
    pages: Any
    first_pages: list[int]
    page_indices: Any
    k: list[Any]  # per sequence [length, G, D]
    v: list[Any]
    sinks: Any  # float32[H]

    def arguments(self, layer: int = 1, chosen: Sequence[int] | None = None) -> tuple[Any, ...]:
        """The composite's arguments, for some of the sequences."""
        import torch

        chosen = range(len(self.lengths)) if chosen is None else chosen
        count = len(chosen)
        lengths = [self.lengths[s] for s in chosen]
        # Each table begins where its sequence's does: the list of entries need not be in the order of the sequences.
        starts = [self.first_pages[s] for s in chosen]
        arrays = ([max(n - 1, 0) for n in lengths], range(count + 1), [*starts, starts[-1]])
        positions, indptr, page_indptr = (torch.tensor(list(a), dtype=torch.int32, device="cuda") for a in arrays)
        kv_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        phases = torch.ones(count, dtype=torch.int32, device="cuda")
        q = self.q[list(chosen)].contiguous()
        sinks = [self.sinks] if self.spec.attention.sinks else []
        return (q, self.pages, positions, indptr, page_indptr, self.page_indices, kv_len, phases, layer, *sinks)


def make_batch(spec: PagedAttentionSpec, lengths: Sequence[int], layer: int = 1) -> Batch:
    """Pages in random order; every slot that no query may read is NaN, and so is every other layer."""
    import torch

    kv, window = spec.kv, spec.attention.window
    dtype = getattr(torch, kv.dtype)
    counts = [-(-n // kv.page_size) for n in lengths]
    order = torch.randperm(sum(counts) + 3)
    first_pages = [sum(counts[:s]) for s in range(len(lengths))]
    shape = (kv.layers, len(order), 2, kv.kv_heads, kv.page_size, kv.head_dim)
    pages = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
    keys, values = [], []
    for first_page, length in zip(first_pages, lengths, strict=True):
        k, v = torch.randn(2, length, kv.kv_heads, kv.head_dim, device="cuda").to(dtype)
        at = torch.arange(max(0, length - window) if window else 0, length)
        page, slot = order[first_page + at // kv.page_size].cuda(), (at % kv.page_size).cuda()
        pages[layer, page, 0, :, slot] = k[at.cuda()]
        pages[layer, page, 1, :, slot] = v[at.cuda()]
        keys.append(k)
        values.append(v)
    q = (torch.randn(len(lengths), spec.attention.heads, kv.head_dim, device="cuda") * 2).to(dtype)
    entries = torch.cat([order[: sum(counts)], torch.tensor([2**30])]).to(torch.int32).cuda()
    pages = pages.reshape(*shape[:4], kv.page_size * kv.head_dim)
    sinks = torch.randn(spec.attention.heads, device="cuda") * 3
    return Batch(spec, lengths, q, pages, first_pages, entries, keys, values, sinks)


def with_sinks(score: Any, sinks: Any) -> Any:
    """Weights of the keys, [H, ..., keys], where each head has a score without a value beside them."""
    import torch

    shape = (len(sinks), *[1] * (score.dim() - 1))
    column = sinks.double().reshape(shape).expand(*score.shape[:-1], 1)
    return torch.cat([score, column], -1).softmax(-1)[..., :-1]


def expected(batch: Batch) -> Any:
    """float64[b, H, D]; zeros where a sequence pads the step."""
    import torch

    attention = batch.spec.attention
    group = attention.heads // attention.kv_heads
    out = torch.zeros(batch.q.shape, dtype=torch.float64, device="cuda")
    for s, length in enumerate(batch.lengths):
        oldest = max(0, length - attention.window) if attention.window else 0
        k, v = (x[oldest:].double().repeat_interleave(group, 1) for x in (batch.k[s], batch.v[s]))
        score = torch.einsum("hd,jhd->hj", batch.q[s].double(), k) * attention.scale
        if attention.soft_cap:
            score = attention.soft_cap * torch.tanh(score / attention.soft_cap)
        weights = with_sinks(score, batch.sinks) if attention.sinks else score.softmax(-1)
        out[s] = torch.einsum("hj,jhd->hd", weights, v) if length else 0
    return out
