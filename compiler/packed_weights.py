"""Packed weight layouts as the compiler sees them: shape, dtype, and a TIR body that turns one back into float32[N, K].

Rows are padded with zeros to panels of 16, but for the formats called rows; P = ceil(N / 16). Little endian throughout.

| format | tensor | inside |
|---|---|---|
| bf16_rows, f16_rows | [N, K] of the dtype | the weight as it is, for matrix units that load tiles of rows |
| f32, f16, bf16 | [P, K, 16] of the dtype (bf16 as uint16) | row n of the weight is lane n % 16 of panel n // 16 |
| q4_0 | uint8[P, K/32, 288] | 256 bytes of nibbles, 16 float16 scales; w = scale * (q - 8) |
| q4_1 | uint8[P, K/32, 320] | 256 bytes of nibbles, 16 float16 scales, 16 float16 minima; w = scale * q + minimum |
| q8_0 | uint8[P, K/32, 544] | 512 int8, 16 float16 scales; w = scale * q |

A block covers 32 values along K. Nibbles are 4 vectors of 64 bytes: byte 4 * row + i of vector j holds k = 4j + i in
its low half and k = 16 + 4j + i in its high half. int8 are 8 such vectors: byte 4 * row + i of vector j is k = 4j + i.
"""

from tvm import tirx
from tvm.script import tirx as T

from tilewright.compiler.errors import CompileError

PANEL = 16  # rows side by side
BLOCK = 32  # values along K that share a scale
DENSE = {"f32": "float32", "f16": "float16", "bf16": "uint16"}
ROWS = {"bf16_rows": "bfloat16", "f16_rows": "float16"}
BLOCK_BYTES = {"q4_0": 288, "q4_1": 320, "q8_0": 544}


def packed_shape(weight_format: str, rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the packed tensor of a weight [rows, columns]. CompileError for an unknown format or a cut block."""
    if weight_format in ROWS:
        return rows, columns
    panels = -(-rows // PANEL)
    if weight_format in DENSE:
        return panels, columns, PANEL
    if weight_format not in BLOCK_BYTES:
        raise CompileError(f"weight format {weight_format!r} is unknown; use one of {[*ROWS, *DENSE, *BLOCK_BYTES]}")
    if columns % BLOCK:
        raise CompileError(
            f"a weight of {columns} columns can't be {weight_format} in blocks of {BLOCK}; use f32, f16 or bf16"
        )
    return panels, columns // BLOCK, BLOCK_BYTES[weight_format]


def packed_dtype(weight_format: str) -> str:
    """Element type of the packed tensor."""
    return ROWS.get(weight_format) or DENSE.get(weight_format, "uint8")


def dequantise_kernel(weight_format: str, rows: int, columns: int) -> tirx.PrimFunc:
    """packed -> float32[rows, columns]; the padding rows are dropped."""
    dtype, value = packed_dtype(weight_format), _VALUES[weight_format]
    # int64 as Relax has its extents, or fusing this kernel with its reader fails.
    shape = [tirx.IntImm("int64", extent) for extent in packed_shape(weight_format, rows, columns)]
    height, width = tirx.IntImm("int64", rows), tirx.IntImm("int64", columns)

    @T.prim_func(private=True, s_tir=True)
    def dequantise(packed_handle: T.handle, weight_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        packed = T.match_buffer(packed_handle, shape, dtype)
        weight = T.match_buffer(weight_handle, (height, width), "float32")
        for n, k in T.grid(height, width):
            with T.sblock("weight"):
                row, column = T.axis.remap("SS", [n, k])
                weight[row, column] = value(packed, row, column)

    return dequantise


def _rows(packed, row, k):
    return T.Cast("float32", packed[row, k])


def _dense(packed, row, k):
    return T.Cast("float32", packed[row // PANEL, k, row % PANEL])


def _bf16(packed, row, k):
    bits = T.Cast("uint32", packed[row // PANEL, k, row % PANEL])
    return T.reinterpret("float32", bits << T.uint32(16))


def _q4_0(packed, row, k):
    return _float16(packed, row, k, 256) * (_nibble(packed, row, k) - T.float32(8))


def _q4_1(packed, row, k):
    return _float16(packed, row, k, 256) * _nibble(packed, row, k) + _float16(packed, row, k, 288)


def _q8_0(packed, row, k):
    lane = row % PANEL
    byte = packed[row // PANEL, k // BLOCK, k % BLOCK // 4 * 64 + lane * 4 + k % 4]
    return _float16(packed, row, k, 512) * T.Cast("float32", T.reinterpret("int8", byte))


def _nibble(packed, row, k):
    """The 4-bit value of element k as float32, 0 to 15."""
    byte = packed[row // PANEL, k // BLOCK, k % 16 // 4 * 64 + row % PANEL * 4 + k % 4]
    shift = T.Cast("uint8", k % BLOCK // 16 * 4)
    return T.Cast("float32", (byte >> shift) & T.uint8(15))


def _float16(packed, row, k, offset: int):
    """The row's float16 in a table of 16 that starts at byte `offset` of its block, as float32."""
    first = row % PANEL * 2 + offset
    low = T.Cast("uint16", packed[row // PANEL, k // BLOCK, first])
    high = T.Cast("uint16", packed[row // PANEL, k // BLOCK, first + 1])
    return T.Cast("float32", T.reinterpret("float16", (high << T.uint16(8)) | low))


_VALUES = {
    "bf16_rows": _rows,
    "f16_rows": _rows,
    "f32": _dense,
    "f16": _dense,
    "bf16": _bf16,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q8_0": _q8_0,
}
