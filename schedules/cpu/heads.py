"""What happens to the heads of a token on their way into attention: norm, rotation, and the place in the pages.

One generator for the fused kernel and for those that stand alone, so that all give the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tilewright.compiler.composites import KVFormat, NormSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Reject
from tilewright.schedules.cpu.isa import (
    LANES,
    Buffer,
    Expr,
    T,
    argument,
    fma,
    load,
    prefetch,
    rows_symbol,
    splat,
    store,
)
from tilewright.schedules.cpu.prologue import rms_scale

Index = tuple[Expr, ...]


def narrow_vectors(extent: int) -> Iterator[tuple[int, int]]:
    """(offset, lanes) of vectors of 16, 8 and 4 that cover `extent`, a multiple of 4."""
    offset = 0
    for lanes in (LANES, 8, 4):
        while extent - offset >= lanes:
            yield offset, lanes
            offset += lanes


def refuse_head_dim(head_dim: int) -> Reject | None:
    if head_dim % 8:
        return Reject(f"head size {head_dim} is not a multiple of 8, two of the narrowest vectors")
    return None


def refuse_pages(kv: KVFormat, target: Target) -> Reject | None:
    if kv.dtype not in ("float32", "float16"):
        return Reject(f"pages of {kv.dtype} have no CPU kernel; use float32 or float16")
    if kv.dtype == "float16" and not (target.has("f16c") or target.has("avx512")):
        return Reject(f"pages of float16 need the CPU feature f16c, which {target.name} lacks; use float32")
    return None


@dataclass(frozen=True)
class Norm:
    """RMS norm of one head: x * scale * weight. Bound to a head by `begin`."""

    spec: NormSpec
    weight: Buffer

    def begin(self, x: Buffer, index: Index) -> Expr:
        return rms_scale(x, index, self.spec.features, self.spec.eps)

    def apply(self, value: Expr, scale: Expr, at: int, lanes: int) -> Expr:
        return T.bind(value * splat(scale, lanes) * load(self.weight, at, lanes=lanes))


def rotate_head(
    x: Buffer, index: Index, cos: Buffer, sin: Buffer, token: Expr, dim: int, norm: Norm | None, out: Buffer, to: Index
) -> None:
    """out[*to, 0:dim] = the rotated (and first normalised) head x[*index, 0:dim]; both indices end in an offset.

    Pairs (i, i + dim/2): [a cos - b sin, b cos + a sin], each with one rounding for its sum.
    """
    half = dim // 2
    *outer, base = index
    *out_outer, out_base = to
    scale = norm.begin(x, index) if norm else None
    for at, lanes in narrow_vectors(half):
        a = load(x, *outer, base + at, lanes=lanes)
        b = load(x, *outer, base + (half + at), lanes=lanes)
        if norm:
            a, b = norm.apply(a, scale, at, lanes), norm.apply(b, scale, half + at, lanes)
        c, s = load(cos, token, at, lanes=lanes), load(sin, token, at, lanes=lanes)
        minus = T.bind(splat(-1.0, lanes) * (b * s))
        store(out, fma(a, c, minus, lanes), *out_outer, out_base + at, lanes=lanes)
        store(out, fma(b, c, T.bind(a * s), lanes), *out_outer, out_base + (half + at), lanes=lanes)


@dataclass(frozen=True)
class Pages:
    """The pages argument of a kernel and how to write into it."""

    kv: KVFormat
    buffer: Buffer

    @staticmethod
    def declare(kv: KVFormat) -> "Pages":
        shape = (kv.layers, rows_symbol("num_pages"), 2, kv.kv_heads, kv.page_size * kv.head_dim)
        return Pages(kv, argument("pages", shape, kv.dtype))

    def place(self, slot: Expr) -> tuple[Expr, Expr]:
        """Page and offset in it of a slot >= 0."""
        size = self.kv.page_size
        return T.bind(T.cast(slot // size, "int64")), T.bind(T.cast(slot % size, "int64"))

    def prefetch(self, layer: Expr, page: Expr, offset: Expr) -> None:
        """Ask for the cache lines that a token is written to: stores that miss wait for memory a few at a time."""
        size, dim, line = self.kv.page_size, self.kv.head_dim, 64 // np.dtype(self.kv.dtype).itemsize
        with T.serial(0, self.kv.kv_heads) as g:
            if self.kv.k_transposed:
                with T.serial(0, dim) as d:
                    prefetch(self.buffer, (layer, page, 0, g, d * size + offset))
            for which in (1,) if self.kv.k_transposed else (0, 1):
                for at in range(0, dim, line):
                    prefetch(self.buffer, (layer, page, which, g, offset * dim + at))

    def write_key(self, layer: Expr, page: Expr, offset: Expr, head: Expr, x: Buffer, index: Index) -> None:
        """x[*index, 0:dim] becomes a column of the page, or a row where keys are not transposed."""
        if not self.kv.k_transposed:
            self._write_row(layer, page, offset, 0, head, x, index)
            return
        *outer, base = index
        with T.serial(0, self.kv.head_dim) as d:
            element = (*outer, base + d)
            value = T.cast(x[element], self.kv.dtype)
            T.buffer_store(self.buffer, value, [layer, page, 0, head, d * self.kv.page_size + offset])

    def write_value(self, layer: Expr, page: Expr, offset: Expr, head: Expr, x: Buffer, index: Index) -> None:
        self._write_row(layer, page, offset, 1, head, x, index)

    def _write_row(
        self, layer: Expr, page: Expr, offset: Expr, which: int, head: Expr, x: Buffer, index: Index
    ) -> None:
        *outer, base = index
        for at, lanes in narrow_vectors(self.kv.head_dim):
            value = load(x, *outer, base + at, lanes=lanes)
            if self.kv.dtype != "float32":
                value = T.cast(value, f"{self.kv.dtype}x{lanes}")
            store(self.buffer, value, layer, page, which, head, offset * self.kv.head_dim + at, lanes=lanes)
