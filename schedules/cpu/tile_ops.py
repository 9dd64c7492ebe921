"""Matrix tiles of x86 (AMX): eight registers of up to 16 rows of 64 bytes, and the same in plain TIR.

The plain form exists so that kernels written on tiles can be checked on any machine. Shapes are fixed for all kernels:

    tiles 0 to 3  int32[16 tokens][16 outputs]     sums
    tiles 4, 5    int8[16 tokens][4 * groups]      activations
    tiles 6, 7    [groups][16 outputs * 4 inputs]  weights, int8 or uint8, 4 inputs of an output side by side
"""

from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx

from tilewright.schedules.cpu.isa import Buffer, Expr, T, bytes_of, store

SUMS, ACTIVATIONS, WEIGHTS = (0, 1, 2, 3), (4, 5), (6, 7)
TOKENS, OUTPUTS = 16, 16
MAX_GROUPS = 16


class TileOps(Protocol):
    """Instructions on tiles; one object serves the kernel of one parallel task.

    `load` takes the bytes from row to row in memory; `store` fills a row of int32[:, 16 * 16] with sums; `dot` reads
    weights as int8 where they are `signed`, else as uint8.
    """

    def begin(self) -> None: ...
    def zero(self, tile: int) -> None: ...
    def load(self, tile: int, buffer: Buffer, offset: Expr, stride: int) -> None: ...
    def dot(self, sums: int, activations: int, weights: int, signed: bool) -> None: ...
    def store(self, tile: int, buffer: Buffer, row: int) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class AmxTiles:
    """The instructions. The process must have asked the kernel for tile registers first (arch_prctl 0x1023, 18)."""

    groups: int

    def __post_init__(self) -> None:
        if not 1 <= self.groups <= MAX_GROUPS:
            raise ValueError(f"tiles of {self.groups} groups of 4 inputs are not within 1 to {MAX_GROUPS}")

    def begin(self) -> None:
        """Load the configuration: palette 1, bytes a row from byte 16 on, rows from byte 48 on.

        Its scope keeps it apart: in storage shared with sums, its address would keep those sums out of registers.
        """
        config = T.alloc_buffer((64,), "uint8", scope="local")
        store(config, bytes_of(0), 0, lanes=64)
        values = {0: 1}
        shapes = ((SUMS, 64, TOKENS), (ACTIVATIONS, 4 * self.groups, TOKENS), (WEIGHTS, 64, self.groups))
        for tiles, row_bytes, rows in shapes:
            for tile in tiles:
                values |= {16 + 2 * tile: row_bytes, 48 + tile: rows}
        for index, value in values.items():
            T.buffer_store(config, tirx.const(value, "uint8"), [index])
        _instruction("ldtilecfg", T.address_of(config[0]))

    def zero(self, tile: int) -> None:
        _instruction("tilezero", _tile(tile))

    def load(self, tile: int, buffer: Buffer, offset: Expr, stride: int) -> None:
        _instruction("tileloadd64", _tile(tile), T.address_of(buffer[offset]), _stride(stride))

    def dot(self, sums: int, activations: int, weights: int, signed: bool) -> None:
        _instruction("tdpbssd" if signed else "tdpbsud", _tile(sums), _tile(activations), _tile(weights))

    def store(self, tile: int, buffer: Buffer, row: int) -> None:
        _instruction("tilestored64", _tile(tile), T.address_of(buffer[row, 0]), _stride(4 * OUTPUTS))

    def end(self) -> None:
        _instruction("tilerelease")


class PlainTiles:
    """The same operations on arrays."""

    def __init__(self, groups: int) -> None:
        self.inputs = 4 * groups

    def begin(self) -> None:
        self.tiles: dict[int, Any] = {t: T.alloc_buffer((TOKENS * OUTPUTS,), "int32") for t in SUMS}
        self.tiles |= {t: T.alloc_buffer((TOKENS * self.inputs,), "int8") for t in ACTIVATIONS}
        self.tiles |= {t: T.alloc_buffer((OUTPUTS * self.inputs,), "uint8") for t in WEIGHTS}

    def zero(self, tile: int) -> None:
        with T.serial(0, TOKENS * OUTPUTS) as i:
            T.buffer_store(self.tiles[tile], T.int32(0), [i])

    def load(self, tile: int, buffer: Buffer, offset: Expr, stride: int) -> None:
        width = self.inputs if tile in ACTIVATIONS else 4 * OUTPUTS
        with T.grid(int(self.tiles[tile].shape[0]) // width, width) as (row, i):
            T.buffer_store(self.tiles[tile], buffer[offset + row * stride + i], [row * width + i])

    def dot(self, sums: int, activations: int, weights: int, signed: bool) -> None:
        c, a, b = (self.tiles[t] for t in (sums, activations, weights))
        with T.grid(TOKENS, OUTPUTS, self.inputs) as (i, n, k):
            w = b[k // 4 * (4 * OUTPUTS) + 4 * n + k % 4]
            w = T.cast(T.reinterpret("int8", w) if signed else w, "int32")
            product = T.cast(a[i * self.inputs + k], "int32") * w
            T.buffer_store(c, c[i * OUTPUTS + n] + product, [i * OUTPUTS + n])

    def store(self, tile: int, buffer: Buffer, row: int) -> None:
        with T.serial(0, self.tiles[tile].shape[0]) as i:
            T.buffer_store(buffer, self.tiles[tile][i], [row, i])

    def end(self) -> None:
        pass


def _instruction(name: str, *operands: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *operands))


def _tile(index: int) -> Expr:
    return tirx.const(index, "int8")


def _stride(bytes_between: int) -> Expr:
    return tirx.const(bytes_between, "int64")
