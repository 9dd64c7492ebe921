"""Attention of a step over KV pages on GPUs without TMA and wgmma: one kernel for all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cuda.attention_mma import AttentionMmaTile, attention_mma_kernel
from tilewright.schedules.cuda.attention_spec import sinks_argument
from tilewright.schedules.cuda.pairs import PTX_TYPES

_LEAST_DIM, _MOST_DIM = 32, 256


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
        refusal = _refuse(call.spec)
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


def _refuse(spec: PagedAttentionSpec) -> Reject | None:
    """Why it has no kernel here; None where it has."""
    attention, kv = spec.attention, spec.kv
    if not attention.causal:
        return Reject("only causal attention has a CUDA kernel")
    if kv.k_transposed:
        return Reject("keys are stored [dim, slot]; the CUDA kernel reads [slot, dim] (KVFormat.k_transposed)")
    if kv.dtype not in PTX_TYPES or spec.dtype != kv.dtype:
        return Reject(f"queries of {spec.dtype} over pages of {kv.dtype}; both must be bfloat16 or both float16")
    if attention.head_dim % 16 or not _LEAST_DIM <= attention.head_dim <= _MOST_DIM:
        return Reject(f"head size {attention.head_dim} is not a multiple of 16 within {_LEAST_DIM}..{_MOST_DIM}")
    if attention.heads % kv.kv_heads:
        return Reject(f"{attention.heads} query heads are not a multiple of {kv.kv_heads} KV heads")
    if attention.window is not None and attention.window < 1:
        return Reject(f"a window of {attention.window} keys leaves a query none")
    return None
