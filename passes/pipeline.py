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
from tilewright.passes.lower_sampling import LowerSampling
from tilewright.passes.plan_buckets import PlanBuckets
from tilewright.passes.quantize_weights import QuantizeWeights


@dataclass(frozen=True)
class PipelineOptions:
    """What the passes are told. `formats`: weight format by checkpoint tensor; `narrow`: those whose
    activations may be rounded to 8 bits; sizes in tokens and sequences."""

    formats: tuple[tuple[str, str], ...]
    narrow: tuple[str, ...]
    page_size: int
    k_transposed: bool
    decode_buckets: tuple[int, ...]
    max_tokens: int
    max_batch: int
    top_logprobs: int
    choose: Callable[[str, Any, int | None, int, tuple[int, ...]], Any]


def pipeline(options: PipelineOptions) -> tuple[tuple[str, tuple[Pass, ...]], ...]:
    """(stage that stands afterwards, passes) in order."""
    o = options
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
                InsertPagedKV(page_size=o.page_size, k_transposed=o.k_transposed),
                QuantizeWeights(formats=o.formats, narrow=o.narrow),
                FuseQKVAppend(),
                FuseLinearNeighbours(),
                LowerSampling(top_logprobs=o.top_logprobs),
                PlanBuckets(decode=o.decode_buckets, max_tokens=o.max_tokens, max_batch=o.max_batch),
            ),
        ),
        # Operators become kernels of the target.
        ("scheduled", (ApplySchedules(choose=o.choose),)),
    )
