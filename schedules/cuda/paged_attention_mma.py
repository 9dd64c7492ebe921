"""Attention of a step over KV pages on GPUs without TMA and wgmma: one kernel for all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cuda.attention_mma import AttentionMmaTile, attention_mma_kernel
from tilewright.schedules.cuda.attention_spec import refuse_attention, sinks_argument


@dataclass(frozen=True)
class PagedAttentionMmaFacts:
    """decode: every token is a generated one of a sequence of its own."""

    spec: PagedAttentionSpec
    decode: bool


class PagedAttentionMma(Schedule):
    name = "paged_attention_mma"
    composite = "paged_attention"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> PagedAttentionMmaFacts | Reject:
        refusal = refuse_attention(call.spec)
        facts = PagedAttentionMmaFacts(call.spec, call.decode)
        if refusal is None and not self.space(facts, target):
            refusal = Reject(f"no tile fits into {target.shared_memory_bytes} bytes of shared memory")
        return facts if refusal is None else refusal

    def space(self, facts: PagedAttentionMmaFacts, target: Target) -> Sequence[AttentionMmaTile]:
        """All have blocks of as many keys, since the bits of a row depend on these."""
        dim = facts.spec.attention.head_dim
        keys = 64 if dim <= 128 else 32
        return [tile for blocks in (2, 1) if (tile := AttentionMmaTile(keys, blocks)).fits(dim, target)]

    def floor(self, facts: PagedAttentionMmaFacts, target: Target) -> Floor:
        """A row's queries and outputs; its keys depend on the position, which no shape tells."""
        attention = facts.spec.attention
        return Floor(bytes_fixed=0, bytes_per_row=4 * attention.heads * attention.head_dim)

    def apply(self, facts: PagedAttentionMmaFacts, tile: AttentionMmaTile, target: Target) -> Lowering:
        spec = facts.spec
        out = Output("out", ("m", spec.attention.heads, spec.attention.head_dim), spec.dtype)
        kernel = attention_mma_kernel(spec, tile, target, facts.decode)
        return Lowering((KernelCall(kernel, (0, 1, 2, 3, 4, 5, 6, 8, sinks_argument(spec)), (out,)),), ("out",))
