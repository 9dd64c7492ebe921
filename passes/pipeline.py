"""The passes in order: the one list there is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilewright.compiler.calls import Call
from tilewright.compiler.composites import LinearSpec
from tilewright.compiler.pass_base import Pass
from tilewright.passes.apply_schedules import ApplySchedules
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.combine_projections import CombineProjections
from tilewright.passes.fuse_angles import FuseAngles
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

    strict: a token gets the same bits whether it was generated or stands in a prompt.
    formats: weight format by checkpoint tensor. narrow: those whose activations may be rounded to 8 bits.
    activations, kv_dtype: dtypes of what the step hands on and of the pages. decode_buckets: batch sizes with a static
    step; any_decode: whether there is one for decode batches of any size. choose: the schedule and tile of a call.
    takes_norm: whether a linear's kernels take the norm before it.
    """

    formats: tuple[tuple[str, str], ...]
    narrow: tuple[str, ...]
    page_size: int
    strict: bool
    k_transposed: bool
    activations: str
    kv_dtype: str
    decode_buckets: tuple[int, ...]
    any_decode: bool
    max_tokens: int
    max_batch: int
    top_logprobs: int
    choose: Callable[[Call], Any]
    takes_norm: Callable[[LinearSpec], bool]


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
                InsertPagedKV(o.page_size, o.kv_dtype, o.k_transposed, o.strict),
                QuantizeWeights(formats=o.formats, narrow=o.narrow),
                FuseQKVAppend(),
                FuseLinearNeighbours(gate_after=not full, takes_norm=o.takes_norm),
                *(() if full else (FuseAngles(), LowerPrecision(dtype=o.activations))),
                LowerSampling(top_logprobs=o.top_logprobs),
                PlanBuckets(
                    decode=o.decode_buckets,
                    any_decode=o.any_decode,
                    max_tokens=o.max_tokens,
                    max_batch=o.max_batch,
                ),
            ),
        ),
        # Operators become kernels of the target.
        ("scheduled", (ApplySchedules(choose=o.choose),)),
    )
