"""Which attention over pages the kernels of GPUs can do, of prompts and of generated tokens alike."""

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.schedules.base import Reject
from tilewright.schedules.cuda.pairs import PTX_TYPES

SINKS = 9  # the argument of paged_attention that holds the sinks, where its spec has them


def sinks_argument(spec: PagedAttentionSpec) -> int:
    """What a kernel takes for its sinks: the queries, unread, where there are none."""
    return SINKS if spec.attention.sinks else 0


def refuse_attention(spec: PagedAttentionSpec) -> Reject | None:
    """Why it has no kernel on any GPU; None where it has."""
    attention, kv = spec.attention, spec.kv
    if not attention.causal:
        return Reject("only causal attention has a CUDA kernel")
    if kv.k_transposed:
        return Reject("keys are stored [dim, slot]; the CUDA kernel reads [slot, dim] (KVFormat.k_transposed)")
    if kv.dtype not in PTX_TYPES or spec.dtype != kv.dtype:
        return Reject(f"queries of {spec.dtype} over pages of {kv.dtype}; both must be bfloat16 or both float16")
    if attention.head_dim % 16 or not 32 <= attention.head_dim <= 256:
        return Reject(f"head size {attention.head_dim} is not a multiple of 16 within 32..256")
    if attention.heads % kv.kv_heads:
        return Reject(f"{attention.heads} query heads are not a multiple of {kv.kv_heads} KV heads")
    if attention.window is not None and attention.window < 1:
        return Reject(f"a window of {attention.window} keys leaves a query none")
    return None
