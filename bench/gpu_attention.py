"""Attention over pages, of decoding queries and of prompts, beside FlashInfer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from cases import AttentionShape
from gpu_compiled import Compiled, compiled, lowered
from gpu_work import Call, Variant, Work, copies, distance, installed

from tilewright.compiler.composites import AttentionSpec, KVFormat, PagedAttentionSpec
from tilewright.schedules.base import Call as CompositeCall
from tilewright.schedules.cuda.paged_attention import PagedAttention

BLOCK = 2048  # queries whose scores the reference holds at a time


@dataclass(frozen=True)
class Step:
    """A step of equal sequences: one token each that attends to `length` keys (decode), or prompts of `length`."""

    shape: AttentionShape
    decode: bool

    @property
    def tokens(self) -> int:
        """Queries of all sequences."""
        return self.shape.batch * self.queries

    @property
    def queries(self) -> int:
        """Of a sequence."""
        return 1 if self.decode else self.shape.length

    @property
    def pages(self) -> int:
        """Of a sequence."""
        return -(-self.shape.length // self.shape.page_size)

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of a layer."""
        shape = self.shape
        return shape.batch * shape.length * 2 * shape.kv_heads * shape.head_dim * 2

    @property
    def layers(self) -> int:
        return copies(self.cache_bytes)

    @property
    def size_bytes(self) -> int:
        """Keys and values, queries and outputs, once."""
        return self.cache_bytes + 2 * self.tokens * self.shape.heads * self.shape.head_dim * 2

    @property
    def operations(self) -> int:
        """Two products of every query with the keys it sees."""
        pairs = self.shape.length if self.decode else self.shape.length * (self.shape.length + 1) // 2
        return self.shape.batch * pairs * 4 * self.shape.heads * self.shape.head_dim

    @property
    def spec(self) -> PagedAttentionSpec:
        shape = self.shape
        kv = KVFormat(self.layers, shape.kv_heads, shape.head_dim, shape.page_size, "bfloat16", k_transposed=False)
        attention = AttentionSpec(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5)
        return PagedAttentionSpec(attention, kv, "bfloat16")


def compile_case(step: Step) -> Compiled:
    call = CompositeCall("paged_attention", step.spec, None, step.tokens, decode=step.decode)
    return compiled(lowered(PagedAttention(), call))


class Batch:
    """Tensors of a step on the GPU: queries, and for each layer keys and values in pages in random order."""

    def __init__(self, step: Step):
        self.step = step
        shape = step.shape
        self.count = shape.batch * step.pages
        self.q = torch.randn(step.tokens, shape.heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        self.page_indices = torch.randperm(self.count, device="cuda", dtype=torch.int32)
        sizes = (step.layers, self.count, 2, shape.kv_heads, shape.page_size, shape.head_dim)
        self.pages = torch.randn(sizes, device="cuda", dtype=torch.bfloat16)
        self.indptr = self._ints(range(0, step.tokens + 1, step.queries))
        self.page_indptr = self._ints(range(0, self.count + 1, step.pages))
        self.kv_len = self._ints([shape.length] * shape.batch)
        first = shape.length - step.queries
        self.positions = self._ints(range(first, shape.length)).repeat(shape.batch)
        self.phases = self._ints([int(step.decode)] * shape.batch)

    @staticmethod
    def _ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device="cuda")

    @cached_property
    def token_first(self) -> torch.Tensor:
        """The pages with all heads of a token side by side: the other layout that FlashInfer takes."""
        return self.pages.transpose(3, 4).contiguous()

    def arguments(self, layer: int) -> tuple[Any, ...]:
        """The composite's."""
        pages = self.pages.flatten(4)
        step = (self.positions, self.indptr, self.page_indptr, self.page_indices, self.kv_len, self.phases)
        return (self.q, pages, *step, layer)

    def expected(self, sequence: int) -> torch.Tensor:
        """float32[queries, heads, head_dim] of layer 0."""
        step, shape = self.step, self.step.shape
        table = self.page_indices[sequence * step.pages : (sequence + 1) * step.pages].long()
        k, v = self.pages[0, table].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : shape.length]
        q = self.q[sequence * step.queries : (sequence + 1) * step.queries].float()
        first = shape.length - step.queries
        blocks = [_attend(q[i : i + BLOCK], k, v, first + i) for i in range(0, step.queries, BLOCK)]
        return torch.cat(blocks)

    @cached_property
    def _checked(self) -> dict[int, torch.Tensor]:
        """What some of the sequences are to get."""
        batch = self.step.shape.batch
        return {s: self.expected(s) for s in {*range(0, batch, -(-batch // 8)), batch - 1}}

    def error(self, out: torch.Tensor) -> float:
        """The greatest of the sequences that are checked."""
        queries = self.step.queries
        errors = [distance(out[s * queries : (s + 1) * queries], right) for s, right in self._checked.items()]
        return max(errors, key=lambda x: (x != x, x))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int) -> torch.Tensor:
    """q[n, H, D], the first at `position`, over k[G, l, D] and v[G, l, D]."""
    group = q.shape[1] // k.shape[0]
    later = torch.arange(k.shape[1], device="cuda") > position + torch.arange(len(q), device="cuda")[:, None]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = (q[:, head] @ k[head // group].t() * q.shape[2] ** -0.5).masked_fill(later, float("-inf"))
        out[:, head] = scores.softmax(-1) @ v[head // group]
    return out


def work(step: Step, ours: Compiled) -> Work:
    """Each call attends to another layer. The planners have run: a step's layers share what they make."""
    batch = Batch(step)
    made: dict[str, torch.Tensor] = {}
    bound = [ours.bind(batch.arguments(layer), step.tokens, made) for layer in range(step.layers)]
    plan = bound[0][0]
    plan()
    own = Variant("tilewright", [own for _, own in bound], lambda: batch.error(made["out"]), apart=plan)
    return Work([own, *_peers(batch)], step.size_bytes, step.operations)


def _peers(batch: Batch) -> Iterator[Variant]:
    """FlashInfer's ways, planned for exactly this step. Both layouts of pages; ours is its "HND"."""
    if not installed("flashinfer"):
        return
    import flashinfer

    for layout in ("HND", "NHD"):
        if batch.step.decode:
            for cores in ("cuda cores", "tensor cores"):
                wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    _workspace(), layout, use_tensor_cores=cores == "tensor cores"
                )
                wrapper.plan(batch.page_indptr, *_planned(batch)[0], **_planned(batch)[1])
                yield _peer(f"flashinfer {cores} {layout}", wrapper, batch, layout)
        else:
            for backend in ("fa2", "fa3"):
                wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), layout, backend=backend)
                arguments, options = _planned(batch)
                wrapper.plan(batch.indptr, batch.page_indptr, *arguments, causal=True, **options)
                yield _peer(f"flashinfer {backend} {layout}", wrapper, batch, layout)


def _workspace() -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def _planned(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the plan calls of both wrappers take after the lists' starts."""
    shape = batch.step.shape
    last = torch.full((shape.batch,), (shape.length - 1) % shape.page_size + 1, dtype=torch.int32, device="cuda")
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.page_size)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    return (batch.page_indices, last, *sizes), types


def _peer(name: str, wrapper: Any, batch: Batch, layout: str) -> Variant:
    pages = batch.pages if layout == "HND" else batch.token_first
    out = torch.full_like(batch.q, float("nan"))

    def call(layer: int) -> Call:
        return lambda: wrapper.run(batch.q, pages[layer], out=out)

    return Variant(name, [call(layer) for layer in range(batch.step.layers)], lambda: batch.error(out))
