"""16-bit floats: what PTX calls them, and two in a 32-bit register."""

from typing import Any

from tvm.script import tirx as T

PTX_TYPES = {"bfloat16": "bf16", "float16": "f16"}


def pack_pair(register: Any, low: Any, high: Any, dtype: str) -> Any:
    """Rounds two float32 values into a register, `low` in its low half."""
    return T.ptx[f"cvt.rn.{PTX_TYPES[dtype]}x2.f32"](register, high, low)


def unpack_pair(register: Any, half: Any, dtype: str) -> Any:
    """The low (0) or high (1) half of a register, as float32. Both widenings are exact."""
    if dtype == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        shift = T.cast(16 - 16 * half, "uint32")
        return T.reinterpret("float32", T.bitwise_and(T.shift_left(register, shift), T.uint32(0xFFFF0000)))
    bits = T.cast(T.shift_right(register, T.cast(16 * half, "uint32")), "uint16")
    return T.cast(T.reinterpret("float16", bits), "float32")
