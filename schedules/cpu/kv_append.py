"""New keys and values into the pages: pages, k f32[t,G,D], v f32[t,G,D], slots i32[t], layer -> pages, in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from tilewright.compiler.composites import AppendSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Reject, Schedule
from tilewright.schedules.cpu.heads import Pages, refuse_head_dim, refuse_pages
from tilewright.schedules.cpu.isa import Expr, T, argument, kernel, rows_symbol
from tilewright.schedules.cpu.rowwise import ROW_TILES, RowTile, for_rows


@dataclass(frozen=True)
class Facts:
    spec: AppendSpec


class KVAppend(Schedule):
    name = "kv_append"
    composite = "kv_append"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> Facts | Reject:
        kv = call.spec.kv
        return refuse_head_dim(kv.head_dim) or refuse_pages(kv, target) or Facts(call.spec)

    def space(self, facts: Facts, target: Target) -> Sequence[RowTile]:
        return ROW_TILES

    def floor(self, facts: Facts, target: Target) -> Floor:
        kv = facts.spec.kv
        elements = 2 * kv.kv_heads * kv.head_dim
        return Floor(bytes_fixed=0, bytes_per_row=elements * (4 + np.dtype(kv.dtype).itemsize) + 4)

    def apply(self, facts: Facts, tile: RowTile, target: Target) -> Lowering:
        kv = facts.spec.kv
        with kernel(f"kv_append_g{kv.kv_heads}_d{kv.head_dim}") as built:
            m = rows_symbol()
            pages = Pages.declare(kv)
            k, v = (argument(n, (m, kv.kv_heads, kv.head_dim), "float32") for n in ("k", "v"))
            slots = argument("slots", (m,), "int32")
            layer = T.arg("layer", tirx.Var("layer", "int64"))

            def append_token(token: Expr) -> None:
                slot = T.bind(slots[token])
                with T.If(slot >= 0), T.Then():
                    page, offset = pages.place(slot)
                    with T.serial(0, kv.kv_heads) as h:
                        pages.write_key(layer, page, offset, h, k, (token, h, 0))
                        pages.write_value(layer, page, offset, h, v, (token, h, 0))

            for_rows(m, append_token, tile)
        return Lowering((KernelCall(built.get(), (0, 1, 2, 3, 4), ()),), (0,))
