"""Rotary embedding on its own: x f32[m,h,D], cos f32[m,D/2], sin f32[m,D/2] -> f32[m,h,D]."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.compiler.composites import RopeSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu.heads import refuse_head_dim, rotate_head
from tilewright.schedules.cpu.isa import Expr, T, argument, kernel, rows_symbol
from tilewright.schedules.cpu.rowwise import ROW_TILES, RowTile, for_rows


@dataclass(frozen=True)
class Facts:
    spec: RopeSpec


class Rope(Schedule):
    name = "rope"
    composite = "rope"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> Facts | Reject:
        return refuse_head_dim(call.spec.head_dim) or Facts(call.spec)

    def space(self, facts: Facts, target: Target) -> Sequence[RowTile]:
        return ROW_TILES

    def floor(self, facts: Facts, target: Target) -> Floor:
        elements = facts.spec.heads * facts.spec.head_dim
        return Floor(bytes_fixed=0, bytes_per_row=8 * elements + 4 * facts.spec.head_dim, flops_per_row=3 * elements)

    def apply(self, facts: Facts, tile: RowTile, target: Target) -> Lowering:
        heads, dim = facts.spec.heads, facts.spec.head_dim
        with kernel(f"rope_h{heads}_d{dim}") as built:
            m = rows_symbol()
            x = argument("x", (m, heads, dim), "float32")
            cos, sin = (argument(n, (m, dim // 2), "float32") for n in ("cos", "sin"))
            y = argument("y", (m, heads, dim), "float32")

            def rotate_token(token: Expr) -> None:
                with T.serial(0, heads) as h:
                    rotate_head(x, (token, h, 0), cos, sin, token, dim, None, y, (token, h, 0))

            for_rows(m, rotate_token, tile)
        out = Output("y", ("m", heads, dim), "float32")
        return Lowering((KernelCall(built.get(), (0, 1, 2), (out,)),), ("y",))
