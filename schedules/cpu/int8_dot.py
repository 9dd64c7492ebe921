"""Dot products of unsigned weights and signed activations, 16 outputs at once, exact in int32 on every machine.

A dot runs over the groups of a block: `begin` with its starting value, `add` 4 inputs of 16 outputs at a time, `end`.
Weights come as uint8x64 (4 inputs of each output side by side), activations as int32x16 that packs 4 int8 in each lane.
"""

from typing import Any, Protocol

from tilewright.models.quant.base import BLOCK
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.isa import I32, LANES, Expr, Isa, T

State = Any


class Dot(Protocol):
    def begin(self, start: Expr) -> State: ...
    def add(self, state: State, weights: Expr, x: Expr) -> State: ...
    def end(self, state: State) -> Expr: ...


def dot_for(machine: Isa, greatest_weight: int) -> Dot:
    """The best way there is for weights of 0 .. greatest_weight, 15 or 255."""
    if machine.vnni:
        return VnniDot()
    if machine.avx2:
        return NarrowDot() if greatest_weight < 16 else SplitDot()
    return PlainDot()


class VnniDot:
    """One instruction a group."""

    def begin(self, start: Expr) -> State:
        return start

    def add(self, state: State, weights: Expr, x: Expr) -> State:
        packed = T.reinterpret("int8x64", x)
        return T.bind(T.call_llvm_pure_intrin(I32, "llvm.x86.avx512.vpdpbusd.512", state, weights, packed))

    def end(self, state: State) -> Expr:
        return state


class PlainDot:
    """Shifts and 32-bit products: any machine."""

    def begin(self, start: Expr) -> State:
        return start

    def add(self, state: State, weights: Expr, x: Expr) -> State:
        words = T.bind(T.reinterpret(I32, weights))
        for i in range(4):
            w = T.bitwise_and(T.shift_right(words, isa.splat(8 * i)), isa.splat(255))
            s = T.shift_right(T.shift_left(x, isa.splat(24 - 8 * i)), isa.splat(24))
            state = state + w * s
        return T.bind(state)

    def end(self, state: State) -> Expr:
        return state


class NarrowDot:
    """Weights below 16, AVX2: sums of byte products fit 16 bits for a whole block."""

    assert BLOCK // 2 * 15 * 128 < 2**15

    def begin(self, start: Expr) -> State:
        return start, None

    def add(self, state: State, weights: Expr, x: Expr) -> State:
        start, sums = state
        products = [_byte_products(_half(weights, h), _half(T.reinterpret("int8x64", x), h)) for h in range(2)]
        return start, products if sums is None else [T.bind(s + p) for s, p in zip(sums, products, strict=True)]

    def end(self, state: State) -> Expr:
        start, sums = state
        return T.bind(start + _widen_pairs(sums))


class SplitDot:
    """Weights of 8 bits, AVX2: a dot of the low nibbles and one of the high nibbles, which counts 16-fold."""

    def begin(self, start: Expr) -> State:
        return NarrowDot().begin(start), NarrowDot().begin(isa.splat(0))

    def add(self, state: State, weights: Expr, x: Expr) -> State:
        low = T.bind(T.bitwise_and(weights, isa.bytes_of(15)))
        high = T.bind(T.bitwise_and(T.shift_right(weights, isa.bytes_of(4)), isa.bytes_of(15)))
        return NarrowDot().add(state[0], low, x), NarrowDot().add(state[1], high, x)

    def end(self, state: State) -> Expr:
        high = T.shift_left(NarrowDot().end(state[1]), isa.splat(4))
        return T.bind(NarrowDot().end(state[0]) + high)


def _half(vector: Expr, which: int) -> Expr:
    """Lanes 0..31 or 32..63 of 64."""
    return isa.permute(vector, range(32 * which, 32 * which + 32))


def _byte_products(weights: Expr, x: Expr) -> Expr:
    """uint8x32, int8x32 -> int16x16: the sums of neighbouring products."""
    return T.bind(T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", weights, x))


def _widen_pairs(sums: list[Expr]) -> Expr:
    """Two int16x16 -> int32x16: the sums of neighbours."""
    ones = T.broadcast(T.int16(1), LANES)
    halves = [T.bind(T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", s, ones)) for s in sums]
    return isa.concatenate(halves, LANES)
