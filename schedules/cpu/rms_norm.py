"""RMS norm on its own: x f32[m, ..., K], weight f32[K] -> f32[m, ..., K]. Same bits as the norm inside a linear."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tilewright.compiler.composites import NormSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Schedule
from tilewright.schedules.cpu.prologue import Prologue
from tilewright.schedules.cpu.rowwise import ROW_TILES, RowTile, rowwise_kernel


@dataclass(frozen=True)
class Facts:
    spec: NormSpec
    inner: tuple[int, ...]  # the dimensions between m and K


class RMSNorm(Schedule):
    name = "rms_norm"
    composite = "rms_norm"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> Facts:
        return Facts(call.spec, call.inner)

    def space(self, facts: Facts, target: Target) -> Sequence[RowTile]:
        return ROW_TILES

    def floor(self, facts: Facts, target: Target) -> Floor:
        features = facts.spec.features
        each = prod(facts.inner) * features
        return Floor(bytes_fixed=4 * features, bytes_per_row=8 * each, flops_per_row=4 * each)

    def apply(self, facts: Facts, tile: RowTile, target: Target) -> Lowering:
        features = facts.spec.features
        func = rowwise_kernel(f"rms_norm_{features}", Prologue(features, norm=facts.spec), tile, facts.inner)
        out = Output("y", ("m", *facts.inner, features), "float32")
        return Lowering((KernelCall(func, (0, 1), (out,)),), ("y",))
