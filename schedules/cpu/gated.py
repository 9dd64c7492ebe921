"""activation(gate) * up on its own: x f32[m, 2I], gate and up side by side -> f32[m, I]. Same bits as in a linear."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.compiler.composites import GatedSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu.isa import ACTIVATIONS
from tilewright.schedules.cpu.prologue import Prologue
from tilewright.schedules.cpu.rowwise import ROW_TILES, RowTile, rowwise_kernel


@dataclass(frozen=True)
class Facts:
    spec: GatedSpec


class Gated(Schedule):
    name = "gated"
    composite = "gated"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> Facts | Reject:
        if call.spec.activation not in ACTIVATIONS:
            return Reject(f"activation {call.spec.activation!r} is none of {', '.join(ACTIVATIONS)}")
        return Facts(call.spec)

    def space(self, facts: Facts, target: Target) -> Sequence[RowTile]:
        return ROW_TILES

    def floor(self, facts: Facts, target: Target) -> Floor:
        return Floor(bytes_fixed=0, bytes_per_row=12 * facts.spec.features, flops_per_row=24 * facts.spec.features)

    def apply(self, facts: Facts, tile: RowTile, target: Target) -> Lowering:
        features, activation = facts.spec.features, facts.spec.activation
        func = rowwise_kernel(f"gated_{activation}_{features}", Prologue(features, gated=facts.spec), tile)
        return Lowering((KernelCall(func, (0,), (Output("y", ("m", features), "float32"),)),), ("y",))
