"""Kernels that turn each row of x into a row of y on its own, by the generator that the linears fuse."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tvm import tirx

from tilewright.schedules.cpu.isa import Expr, T, argument, kernel, rows_symbol
from tilewright.schedules.cpu.prologue import Prologue


@dataclass(frozen=True)
class RowTile:
    """few_rows: up to this many rows one thread does them all, as starting the others would cost more."""

    few_rows: int = 4

    def __post_init__(self) -> None:
        if self.few_rows < 0:
            raise ValueError(f"few_rows {self.few_rows} is negative")


ROW_TILES = (RowTile(), RowTile(1), RowTile(16))


def rowwise_kernel(name: str, prologue: Prologue, tile: RowTile, inner: tuple[int, ...] = ()) -> tirx.PrimFunc:
    """x f32[m, *inner, in_width] (norm_weight f32[features]) -> y f32[m, *inner, features]."""
    with kernel(name) as built:
        m = rows_symbol()
        x = argument("x", (m, *inner, prologue.in_width), "float32")
        weight = argument("weight", (prologue.features,), "float32") if prologue.norm else None
        y = argument("y", (m, *inner, prologue.features), "float32")
        rows = m * prod(inner)
        x, y = (T.decl_buffer((rows, b.shape[-1]), b.dtype, data=b.data) for b in (x, y))

        for_rows(rows, lambda row: prologue.write_row(x, weight, row, y), tile)
    return built.get()


def for_rows(rows: Expr, body: Callable[[Expr], None], tile: RowTile) -> None:
    """body(row) for every row; on one thread where they are few."""
    with T.If(rows <= tile.few_rows):
        with T.Then(), T.serial(0, rows) as row:
            body(row)
        with T.Else(), T.parallel(0, rows) as row:
            body(row)
