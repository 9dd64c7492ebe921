"""Dense linears on GPUs without wgmma, y = x @ W^T with bias, gate and residual, for any number of tokens."""

from collections.abc import Sequence

from tilewright.compiler.packed_weights import ROWS
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cuda.linear import Linear, LinearFacts
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
        if ROWS.get(spec.weight_format) != spec.dtype:
            return Reject(f"weights in {spec.weight_format} are not rows of the activations' {spec.dtype}")
        if spec.norm or spec.gated:
            return Reject("norms and gates before the product are kernels of their own")
        if spec.in_features % 2:
            return Reject(f"rows of {spec.in_features} values are no multiple of 4 bytes")
        if spec.out_dtype not in (spec.dtype, "float32") or (spec.out_dtype == "float32" and spec.residual):
            return Reject(f"results in {spec.out_dtype}{' with a residual' * spec.residual} are not stored")
        if spec.gate and spec.out_features % 16:
            return Reject(f"{spec.out_features // 2} outputs of a gate are no multiple of 8")
        return LinearFacts(spec, call.rows)

    def bounds(self, call: Call, target: Target) -> Sequence[int]:
        return _BOUNDS

    def space(self, facts: LinearFacts, target: Target) -> Sequence[LinearMmaTile]:
        return tiles(facts.spec.out_features, facts.spec.in_features, facts.rows, target)

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        return Linear().floor(facts, target)

    def apply(self, facts: LinearFacts, tile: LinearMmaTile, target: Target) -> Lowering:
        spec = facts.spec
        # The kernel takes the weight in place of a bias or residual that is not there, and does not read it.
        bias = 2 if spec.bias else 1
        residual = 2 + spec.bias if spec.residual else 1
        outs = spec.out_features // 2 if spec.gate else spec.out_features
        out = Output("y", ("m", outs), spec.out_dtype)
        return Lowering((KernelCall(linear_mma_kernel(spec, tile, target), (0, 1, bias, residual), (out,)),), ("y",))
