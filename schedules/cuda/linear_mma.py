"""Dense linears on GPUs without wgmma, y = x @ W^T with bias, gate and residual, for any number of tokens."""

from collections.abc import Sequence

from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, Lowering, Reject, Schedule
from tilewright.schedules.cuda.linear import Linear, LinearFacts, linear_lowering, refuse_linear
from tilewright.schedules.cuda.linear_mma_kernel import linear_mma_kernel
from tilewright.schedules.cuda.linear_mma_tile import LinearMmaTile, tiles

# Tokens up to each of which a linear has tiles of its own; above the last, tiles are as good as they get.
_BOUNDS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)


class LinearMma(Schedule):
    name = "linear_mma"
    composite = "linear"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> LinearFacts | Reject:
        spec = call.spec
        refusal = refuse_linear(spec)
        if refusal is not None:
            return refusal
        if spec.in_features % 2:
            return Reject(f"rows of {spec.in_features} values are no multiple of 4 bytes")
        if spec.gate and spec.out_features % 16:
            return Reject(f"{spec.result_features} outputs of a gate are no multiple of 8")
        return LinearFacts(spec, call.rows)

    def bounds(self, call: Call, target: Target) -> Sequence[int]:
        return _BOUNDS

    def space(self, facts: LinearFacts, target: Target) -> Sequence[LinearMmaTile]:
        return tiles(facts.spec.out_features, facts.spec.in_features, facts.rows, target)

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        return Linear().floor(facts, target)

    def apply(self, facts: LinearFacts, tile: LinearMmaTile, target: Target) -> Lowering:
        return linear_lowering(facts.spec, linear_mma_kernel(facts.spec, tile, target))
