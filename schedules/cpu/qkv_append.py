"""From the joint projection into attention: split, normalise and rotate q and k, put k and v into the pages.

qkv f32[m,(H+2G)*D], cos f32[m,D/2], sin f32[m,D/2], (q_norm f32[D], k_norm f32[D]), pages, slots i32[m], layer
    -> q f32[m,H,D], pages in place
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from tilewright.compiler.composites import QKVAppendSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu.heads import Norm, Pages, refuse_head_dim, refuse_pages, rotate_head
from tilewright.schedules.cpu.isa import Expr, T, argument, kernel, registers, rows_symbol
from tilewright.schedules.cpu.rowwise import ROW_TILES, RowTile, for_rows

# Elements of k, over all rows, up to which one thread does them: each waits for a cache line of its own, and 3000 such
# waits cost what starting the other threads does.
SERIAL_KEYS = 3072


@dataclass(frozen=True)
class Facts:
    spec: QKVAppendSpec


class QKVAppend(Schedule):
    name = "qkv_append"
    composite = "qkv_append"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> Facts | Reject:
        kv, norm = call.spec.kv, call.spec.norm
        if norm and norm.features != kv.head_dim:
            return Reject(f"a norm over {norm.features} features does not fit heads of {kv.head_dim}")
        return refuse_head_dim(kv.head_dim) or refuse_pages(kv, target) or Facts(call.spec)

    def space(self, facts: Facts, target: Target) -> Sequence[RowTile]:
        few = max(1, SERIAL_KEYS // (facts.spec.kv.kv_heads * facts.spec.kv.head_dim))
        return [RowTile(few), *(tile for tile in ROW_TILES if tile.few_rows != few)]

    def floor(self, facts: Facts, target: Target) -> Floor:
        heads, kv = facts.spec.heads, facts.spec.kv
        read = (heads + 2 * kv.kv_heads) * kv.head_dim + kv.head_dim + 1
        stored = 2 * kv.kv_heads * kv.head_dim * np.dtype(kv.dtype).itemsize
        return Floor(
            bytes_fixed=8 * kv.head_dim if facts.spec.norm else 0,
            bytes_per_row=4 * (read + heads * kv.head_dim) + stored,
            flops_per_row=(7 if facts.spec.norm else 3) * (heads + kv.kv_heads) * kv.head_dim,
        )

    def apply(self, facts: Facts, tile: RowTile, target: Target) -> Lowering:
        spec = facts.spec
        func = _build(spec, tile)
        norms = 2 if spec.norm else 0
        out = Output("q", ("m", spec.heads, spec.kv.head_dim), "float32")
        return Lowering((KernelCall(func, tuple(range(6 + norms)), (out,)),), ("q", 3 + norms))


def _build(spec: QKVAppendSpec, tile: RowTile) -> tirx.PrimFunc:
    heads, groups, dim = spec.heads, spec.kv.kv_heads, spec.kv.head_dim
    with kernel(f"qkv_append_h{heads}_g{groups}_d{dim}" + "_norm" * bool(spec.norm)) as built:
        m = rows_symbol()
        qkv = argument("qkv", (m, (heads + 2 * groups) * dim), "float32")
        cos, sin = (argument(n, (m, dim // 2), "float32") for n in ("cos", "sin"))
        q_norm = Norm(spec.norm, argument("q_norm", (dim,), "float32")) if spec.norm else None
        k_norm = Norm(spec.norm, argument("k_norm", (dim,), "float32")) if spec.norm else None
        pages = Pages.declare(spec.kv)
        slots = argument("slots", (m,), "int32")
        layer = T.arg("layer", tirx.Var("layer", "int64"))
        q = argument("q", (m, heads, dim), "float32")

        def append(token: Expr, page: Expr, offset: Expr) -> None:
            key = registers(dim)
            with T.serial(0, groups) as g:
                rotate_head(qkv, (token, (heads + g) * dim), cos, sin, token, dim, k_norm, key, (0,))
                pages.write_key(layer, page, offset, g, key, (0,))
                pages.write_value(layer, page, offset, g, qkv, (token, (heads + groups + g) * dim))

        def token_body(token: Expr) -> None:
            slot = T.bind(slots[token])
            page, offset = pages.place(slot)
            with T.If(slot >= 0), T.Then():
                pages.prefetch(layer, page, offset)
            with T.serial(0, heads) as h:  # meanwhile
                rotate_head(qkv, (token, h * dim), cos, sin, token, dim, q_norm, q, (token, h, 0))
            with T.If(slot >= 0), T.Then():
                append(token, page, offset)

        for_rows(m, token_body, tile)
    return built.get()
