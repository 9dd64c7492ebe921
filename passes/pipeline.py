"""The passes in order: the one list there is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilewright.compiler.pass_base import Pass
from tilewright.passes.apply_schedules import ApplySchedules
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.combine_projections import CombineProjections
from tilewright.passes.fuse_attention import FuseAttention
from tilewright.passes.fuse_gated_mlp import FuseGatedMlp
from tilewright.passes.fuse_linear import FuseLinear
from tilewright.passes.fuse_linear_neighbours import FuseLinearNeighbours
from tilewright.passes.fuse_norm import FuseNorm
from tilewright.passes.fuse_qkv_append import FuseQKVAppend
from tilewright.passes.fuse_rope import FuseRope
from tilewright.passes.insert_paged_kv import InsertPagedKV
from tilewright.passes.lower_precision import LowerPrecision
from tilewright.passes.lower_sampling import LowerSampling
from tilewright.passes.plan_buckets import PlanBuckets
from tilewright.passes.quantize_weights import QuantizeWeights


@dataclass(frozen=True)
class PipelineOptions:
    """What the passes are told; sizes in tokens and sequences.

    formats: weight format by checkpoint tensor. narrow: those whose activations may be rounded to 8 bits.
    activations, kv_dtype: dtypes of what the step hands on and of the pages. decode_buckets: batch sizes with a static
    step; mixed_buckets: bounds on tokens with a symbolic one, besides max_tokens.
    """

    formats: tuple[tuple[str, str], ...]
    narrow: tuple[str, ...]
    page_size: int
    k_transposed: bool
    activations: str
    kv_dtype: str
    decode_buckets: tuple[int, ...]
    mixed_buckets: tuple[int, ...]
    max_tokens: int
    max_batch: int
    top_logprobs: int
    choose: Callable[[str, Any, int | None, int, tuple[int, ...]], Any]


def pipeline(options: PipelineOptions) -> tuple[tuple[str, tuple[Pass, ...]], ...]:
    """(stage that stands afterwards, passes) in order."""
    o = options
    full = o.activations == "float32"
    return (
        # Find the structure in plain mathematics.
        (
            "fused",
            (
                Canonicalize(),
                FuseAttention(),
                FuseRope(),
                FuseNorm(),
                FuseGatedMlp(),
                FuseLinear(),
                CombineProjections(formats=o.formats),
            ),
        ),
        # One sequence becomes a batch over pages; operators join what surrounds them.
        (
            "served",
            (
                InsertPagedKV(page_size=o.page_size, kv_dtype=o.kv_dtype, k_transposed=o.k_transposed),
                QuantizeWeights(formats=o.formats, narrow=o.narrow),
                FuseQKVAppend(),
                FuseLinearNeighbours(gate_after=not full),
                *(() if full else (LowerPrecision(dtype=o.activations),)),
                LowerSampling(top_logprobs=o.top_logprobs),
                PlanBuckets(
                    decode=o.decode_buckets,
                    mixed=o.mixed_buckets,
                    max_tokens=o.max_tokens,
                    max_batch=o.max_batch,
                ),
            ),
        ),
        # Operators become kernels of the target.
        ("scheduled", (ApplySchedules(choose=o.choose),)),
    )
