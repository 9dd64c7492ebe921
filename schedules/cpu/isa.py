"""Vector primitives of the CPU kernels: 16 lanes wide, written with TVM's IRBuilder.

Every value is a TIR expression; `bound` values are SSA names, so an expression used twice is computed once. LLVM splits
the 16 lanes where the machine has narrower registers. What differs between machines is in `Isa`
(float16) and in int8_dot.py, chosen by target features; all else is portable.

TVM lets LLVM contract a*b + c into one rounding wherever it likes. Kernels must agree bit for bit, so a product that
feeds a sum is always written as `fma`, never as `*` and `+`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from tilewright.compiler.targets.base import Target

LANES = 16
F32 = f"float32x{LANES}"
I32 = f"int32x{LANES}"
Expr = Any  # a TIR expression
Buffer = Any  # a TIR buffer


# --- functions, buffers, memory ---------------------------------------------------------------------------------------


@contextmanager
def kernel(name: str) -> Iterator[Any]:
    """A PrimFunc under construction: `with kernel("f") as built: ...`, then `built.get()`."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        yield builder


def argument(name: str, shape: Sequence[Any], dtype: str) -> Buffer:
    """The next parameter of the kernel, a compact tensor."""
    return T.arg(name, T.buffer(tuple(shape), dtype))


def rows_symbol(name: str = "m") -> Expr:
    """A symbolic extent, bound from the buffer shapes it appears in. 64 bits: rows * columns may exceed 2^31."""
    return tirx.Var(name, "int64")


def flat(buffer: Buffer) -> Buffer:
    """The same elements addressed as one row. Only after the last `argument`."""
    size = buffer.shape[0]
    for extent in buffer.shape[1:]:
        size = size * extent
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data)


def registers(count: int = LANES, dtype: str = "float32") -> Buffer:
    """A small array that LLVM keeps in registers when every index is constant.

    Its scope must be "global": TVM turns "local" arrays of CPU kernels into workspace calls, that is, memory.
    """
    return T.alloc_buffer((count,), dtype, scope="global")


def load(buffer: Buffer, *index: Expr, lanes: int = LANES, dtype: str | None = None) -> Expr:
    """`lanes` consecutive elements along the last dimension from `index` on, bound."""
    return T.bind(buffer.vload(list(index), f"{dtype or buffer.dtype}x{lanes}"))


def store(buffer: Buffer, value: Expr, *index: Expr, lanes: int = LANES) -> None:
    *outer, last = index
    T.buffer_store(buffer, value, [*outer, T.ramp(last, 1, lanes)])


def prefetch(buffer: Buffer, at: Expr) -> None:
    """Ask for the cache line of buffer[at] some hundred cycles before it is read.

    Into the second-level cache (locality 2): a core has more requests of that kind under way at a time than of the kind
    that fills the first level, which made streams from memory 1.7 times as fast on Zen 4.
    """
    pointer, read, locality, data = T.address_of(buffer[at]), T.int32(0), T.int32(2), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", pointer, read, locality, data))


def load_part(buffer: Buffer, count: int, *index: Expr) -> Expr:
    """The first `count` < LANES elements, then zeros; nothing beyond them is read."""
    *outer, last = index
    places = [(*outer, last + i) for i in range(count)]
    zeros = [tirx.const(0, buffer.dtype)] * (LANES - count)
    return T.bind(join([buffer[place] for place in places] + zeros))


def store_part(buffer: Buffer, value: Expr, count: int, *index: Expr) -> None:
    """The first `count` lanes of a vector; nothing beyond them is written."""
    *outer, last = index
    for i in range(count):
        T.buffer_store(buffer, lane(value, i), [*outer, last + i])


def settled(value: Expr, dtype: str = "int32") -> Expr:
    """The same scalar as a fresh symbol, by way of a cell that LLVM removes again.

    TVM's simplifier otherwise expands what a bound value was made of at each index that uses it, in pass after pass:
    nested divisions and minima in loop bounds then cost seconds of compile time.
    """
    cell = T.alloc_buffer((1,), dtype)
    T.buffer_store(cell, value, [0])
    return T.bind(cell[0])


# --- building vectors -------------------------------------------------------------------------------------------------


def splat(value: Expr, lanes: int = LANES) -> Expr:
    """One scalar in every lane; a Python float becomes float32, an int int32."""
    if isinstance(value, float):
        value = T.float32(value)
    elif isinstance(value, int):
        value = T.int32(value)
    return T.broadcast(value, lanes)


def bytes_of(value: int) -> Expr:
    """The same byte in all 64 lanes of a uint8 vector."""
    return T.broadcast(tirx.const(value, "uint8"), 4 * LANES)


def join(scalars: Sequence[Expr]) -> Expr:
    """A vector of the given scalars."""
    return tirx.Shuffle(list(scalars), [tirx.const(i, "int32") for i in range(len(scalars))])


def permute(value: Expr, indices: Sequence[int]) -> Expr:
    return T.bind(tirx.Shuffle([value], [tirx.const(i, "int32") for i in indices]))


def concatenate(vectors: Sequence[Expr], lanes: int) -> Expr:
    """Several equal vectors, one after the other; `lanes` in all."""
    return T.bind(tirx.Shuffle(list(vectors), [tirx.const(i, "int32") for i in range(lanes)]))


def lane(value: Expr, index: int) -> Expr:
    return T.bind(tirx.Shuffle([value], [tirx.const(index, "int32")]))


def lane_index(base: Expr = 0) -> Expr:
    """int32: base, base + 1, ... base + 15."""
    return T.ramp(base, 1, LANES)


# --- float32 ----------------------------------------------------------------------------------------------------------


def _call(dtype: str, name: str, *operands: Expr) -> Expr:
    return T.bind(T.call_llvm_pure_intrin(dtype, name, *operands))


def fma(a: Expr, b: Expr, c: Expr, lanes: int = LANES) -> Expr:
    """a * b + c with one rounding."""
    return _call(f"float32x{lanes}", f"llvm.fma.v{lanes}f32", a, b, c)


def fma_scalar(a: Expr, b: Expr, c: Expr) -> Expr:
    return _call("float32", "llvm.fma.f32", a, b, c)


def _hidden(value: Expr) -> Expr:
    """A vector as a fresh symbol (see `settled`): selections nested in an exp otherwise cost 15 seconds to compile."""
    cell = registers()
    store(cell, value, 0)
    return load(cell, 0)


def maximum(a: Expr, b: Expr) -> Expr:
    """a > b ? a : b, so b where either is NaN: one instruction, which the NaN rules of IEEE's maximum are not."""
    return _hidden(T.Select(a > b, a, b))


def minimum(a: Expr, b: Expr) -> Expr:
    """a < b ? a : b, so b where either is NaN."""
    return _hidden(T.Select(a < b, a, b))


def absolute(a: Expr) -> Expr:
    return _call(F32, "llvm.fabs.v16f32", a)


def round_even(a: Expr) -> Expr:
    """To the nearest integer, ties to even, still float32."""
    return _call(F32, "llvm.nearbyint.v16f32", a)


def opaque(a: Expr) -> Expr:
    """The same value, over which LLVM must not contract: for a product that another function's sum may meet."""
    return _call(F32, "llvm.arithmetic.fence.v16f32", a)


def sum_lanes(value: Expr) -> Expr:
    """Scalar sum by a fixed tree: lanes 8 apart, then 4, 2, 1."""
    for distance in (8, 4, 2, 1):
        value = T.bind(value + permute(value, [i ^ distance for i in range(LANES)]))
    return lane(value, 0)


def max_lanes(value: Expr) -> Expr:
    """The greatest lane, a scalar; any number if a lane is NaN."""
    for distance in (8, 4, 2, 1):
        value = maximum(value, permute(value, [i ^ distance for i in range(LANES)]))
    return lane(value, 0)


def max_magnitude(values: Sequence[Expr]) -> Expr:
    """The greatest |x| over several vectors, a scalar; NaN if any is NaN. Magnitudes order as their bits do."""
    bits = [T.bitwise_and(T.reinterpret(I32, v), splat(0x7FFFFFFF)) for v in values]
    most = bits[0]
    for other in bits[1:]:
        most = T.max(most, other)
    return T.reinterpret("float32", _call("int32", "llvm.vector.reduce.smax.v16i32", T.bind(most)))


def extremes(values: Sequence[Expr]) -> tuple[Expr, Expr]:
    """The least and the greatest x over several vectors and zero, scalars; one of them is NaN if any x is.

    Flipping all bits but the sign of negative numbers makes integers that order as the numbers do, and back.
    """

    def flipped(bits: Expr, ones: Expr, places: Expr) -> Expr:
        return T.bind(T.bitwise_xor(bits, T.bitwise_and(T.shift_right(bits, places), ones)))

    keys = [flipped(T.reinterpret(I32, v), splat(0x7FFFFFFF), splat(31)) for v in values]
    low = high = keys[0]
    for other in keys[1:]:
        low, high = T.min(low, other), T.max(high, other)
    found = []
    for name, vector, combine in (("smin", low, T.min), ("smax", high, T.max)):
        key = settled(combine(_call("int32", f"llvm.vector.reduce.{name}.v16i32", T.bind(vector)), T.int32(0)))
        found.append(settled(T.reinterpret("float32", flipped(key, T.int32(0x7FFFFFFF), T.int32(31))), "float32"))
    return found[0], found[1]


def sum_lanes_i32(value: Expr) -> Expr:
    return _call("int32", "llvm.vector.reduce.add.v16i32", value)


# exp(r) on |r| <= ln(2)/2, highest power first; ln(2) in two parts so that n * ln(2) is exact (Cephes, expf).
_EXP_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def exp(x: Expr) -> Expr:
    """e^x, relative error below 2e-7, never subnormal: exactly zero below -87.7 (x is clamped to [-88, 87])."""
    x = minimum(splat(87.0), maximum(splat(-88.0), x))  # in this order NaN passes
    n = round_even(x * splat(1.4426950408889634))
    r = fma(n, splat(-_LN2_LOW), fma(n, splat(-_LN2_HIGH), x))
    p = splat(_EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        p = fma(p, r, splat(term))
    p = fma(p, r * r, r + splat(1.0))
    power = T.shift_left(T.cast(n, I32) + splat(127), splat(23))  # n = -127 gives the bits of 0.0
    return opaque(p * T.reinterpret(F32, power))


def silu(x: Expr) -> Expr:
    """x / (1 + e^-x)."""
    return T.bind(x / (splat(1.0) + exp(splat(0.0) - x)))


def gelu_tanh(x: Expr) -> Expr:
    """0.5 x (1 + tanh(z)) = x / (1 + e^-2z), z = sqrt(2/pi) (x + 0.044715 x^3). Hendrycks and Gimpel 2016."""
    inner = fma(T.bind(x * x) * splat(0.044715), x, x)
    return T.bind(x / (splat(1.0) + exp(inner * splat(-2.0 * 0.7978845608028654))))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


# --- what differs between machines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Isa:
    """The primitives that target features decide. All choices give the same bits."""

    vnni: bool
    avx2: bool
    f16c: bool

    @staticmethod
    def of(target: Target) -> "Isa":
        avx512 = target.has("avx512")
        return Isa(target.has("avx512vnni"), avx512 or target.has("avx2"), avx512 or target.has("f16c"))

    def half_to_float(self, half: Expr) -> Expr:
        """float16x16 or its bits as uint16x16 -> float32x16, exact for every finite value."""
        if self.f16c:
            return T.bind(T.cast(T.reinterpret("float16x16", half), F32))
        bits = T.bind(T.cast(T.reinterpret("uint16x16", half), I32))
        magnitude = T.reinterpret(F32, T.shift_left(T.bitwise_and(bits, splat(0x7FFF)), splat(13)))
        scaled = T.reinterpret(I32, magnitude * splat(2.0**112))  # moves the exponent's bias from 15 to 127
        sign = T.shift_left(T.bitwise_and(bits, splat(0x8000)), splat(16))
        return T.bind(T.reinterpret(F32, T.bitwise_or(scaled, sign)))

    def brain_to_float(self, bits: Expr) -> Expr:
        """bfloat16 as uint16x16 -> float32x16."""
        return T.bind(T.reinterpret(F32, T.shift_left(T.cast(bits, "uint32x16"), T.broadcast(T.uint32(16), LANES))))
