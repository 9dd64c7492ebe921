"""The arithmetic of block-quantised linears, shared by all their kernels so that they agree bit for bit.

A row of activations becomes integer blocks of 32 with a scale s each. For a block of weights with scale d (minimum m):

    dot = sum of q * x over the block            exact, int32
    q4_1: acc = fma(m, s * sum x, acc); acc = fma(float(dot), d * s, acc)
    q4_0, q8_0: acc = fma(float(dot), d * s, acc)

in increasing K from acc = 0. The dot-product instruction wants unsigned weights: q4_0 uses q as it is stored (0..15)
and starts the dot at -8 sum x, q8_0 uses q + 128 and starts at -128 sum x.

Activations of 16 bits are two planes of int8, x = 256 high + low, and a dot is that of the high plane, shifted by 8,
plus that of the low one. Every sum on the way fits int32: with weights up to 255 it is at most (see `_GREATEST`)
32 * 255 * 32639 + 32 * 128 * 32639 < 2^29 in magnitude.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tilewright.compiler.composites import LinearSpec
from tilewright.models.quant.base import BLOCK
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.int8_dot import Dot, dot_for
from tilewright.schedules.cpu.isa import LANES, Buffer, Expr, Isa, T

BLOCK_KERNEL_FORMATS = ("q4_0", "q4_1", "q8_0")
GROUPS = BLOCK // 4  # groups of 4 inputs in a block: one dot-product instruction each
_SMALLEST = 1e-30  # a block whose magnitudes are all below counts as zero: greatest / amax must stay finite
_GREATEST = {8: 127, 16: 127 * 256 + 127}  # magnitude of an activation, by bits: the high byte never leaves int8
assert max(_GREATEST.values()) * BLOCK * (255 + 128) < 2**29


def quantize_block(values: Sequence[Expr], bits: int) -> tuple[list[Expr], Expr, Expr]:
    """Two float32x16 -> two int32x16, the scale amax / greatest, and their int32 sum. Ties go to even."""
    greatest = float(_GREATEST[bits])
    amax = T.bind(isa.max_magnitude(values))
    nothing = amax < T.float32(_SMALLEST)  # not so for NaN, which stays visible in the scale
    scale = T.bind(T.Select(nothing, T.float32(0.0), amax * T.float32(1.0 / greatest)))
    inverse = T.bind(T.Select(nothing, T.float32(0.0), T.float32(greatest) / amax))
    q = [T.bind(T.cast(isa.round_even(v * isa.splat(inverse)), isa.I32)) for v in values]
    return q, scale, isa.sum_lanes_i32(q[0] + q[1])


@dataclass(frozen=True)
class BlockFormat:
    """How a kernel reads one weight format."""

    isa: Isa
    name: str  # of BLOCK_KERNEL_FORMATS
    activation_bits: int  # 8 or 16

    @staticmethod
    def of(spec: LinearSpec, machine: Isa) -> "BlockFormat":
        return BlockFormat(machine, spec.weight_format, spec.activation_bits)

    @property
    def planes(self) -> int:
        """Bytes of an activation, each a dot of its own."""
        return self.activation_bits // 8

    @property
    def has_minimum(self) -> bool:
        return self.name == "q4_1"

    @property
    def _nibbles(self) -> bool:
        return self.name != "q8_0"

    def split(self, q: Expr) -> list[Expr]:
        """int32x16 activations -> int8x16 by plane, the lowest first: q = 256 high + low, low in -128..127."""
        low = T.cast(q, f"int8x{LANES}")  # keeps the low byte
        if self.planes == 1:
            return [low]
        return [low, T.cast(T.shift_right(q + isa.splat(128), isa.splat(8)), f"int8x{LANES}")]

    def joined(self, dots: Sequence[Expr]) -> Expr:
        """The dot of whole activations from those of their planes, the lowest first."""
        return dots[0] if self.planes == 1 else dots[0] + T.shift_left(dots[1], isa.splat(8))

    def correction(self, scale: Expr, total: Expr) -> Expr:
        """What the zero point of the weights asks of a block of activations: s * sum x, or where the dot starts."""
        if self.has_minimum:
            return scale * T.cast(total, "float32")
        return total * T.int32(-8 if self.name == "q4_0" else -128)

    def start(self, correction: Expr) -> Expr:
        """The int32x16 that a dot starts from."""
        return isa.splat(0) if self.has_minimum else isa.splat(correction)

    def scales(self, weight: Buffer, panel: Expr, block: Expr) -> tuple[Expr, Expr | None]:
        """d and m (None without minima) of a panel's block, float32x16 each."""
        base = 256 if self._nibbles else 512
        d = self._halves(weight, panel, block, base)
        return d, self._halves(weight, panel, block, base + 2 * LANES) if self.has_minimum else None

    def _halves(self, weight: Buffer, panel: Expr, block: Expr, offset: int) -> Expr:
        raw = isa.load(weight, panel, block, offset, lanes=2 * LANES)
        return self.isa.half_to_float(T.reinterpret(f"uint16x{LANES}", raw))

    def weights(self, weight: Buffer, panel: Expr, block: Expr) -> list[Expr]:
        """The 8 vectors uint8x64 of a block, unpacked: for kernels that use them for many tokens."""
        if not self._nibbles:
            return [self._bytes(weight, panel, block, j) for j in range(GROUPS)]
        packed = [isa.load(weight, panel, block, 64 * j, lanes=64) for j in range(GROUPS // 2)]
        low = [T.bind(T.bitwise_and(v, isa.bytes_of(15))) for v in packed]
        high = [T.bind(T.bitwise_and(T.shift_right(v, isa.bytes_of(4)), isa.bytes_of(15))) for v in packed]
        return low + high

    def _bytes(self, weight: Buffer, panel: Expr, block: Expr, group: int) -> Expr:
        return T.bind(T.bitwise_xor(isa.load(weight, panel, block, 64 * group, lanes=64), isa.bytes_of(128)))

    @cached_property
    def products(self) -> Dot:
        """How to multiply what `weights` gives."""
        return dot_for(self.isa, 15 if self._nibbles else 255)

    def dot(self, weight: Buffer, panel: Expr, block: Expr, x: Sequence[Sequence[Expr]], correction: Expr) -> Expr:
        """The dot of a block for one token; x: by plane, the lowest first, its 8 vectors."""
        half = GROUPS // 2  # two chains hide the latency
        low, high = [plane[:half] for plane in x], [plane[half:] for plane in x]
        start, zero = self.start(correction), isa.splat(0)
        if self._nibbles and self.isa.vnni:
            # High nibbles need no shift where bytes of any size multiply as fast: their dot is 16-fold, and an exact
            # multiple of 16 below 16 * 15 * BLOCK / 2 * 2^15 < 2^28.
            packed = [isa.load(weight, panel, block, 64 * j, lanes=64) for j in range(half)]
            w = [T.bind(T.bitwise_and(v, isa.bytes_of(mask))) for mask in (0x0F, 0xF0) for v in packed]
            return T.bind(
                self._chain(start, w[:half], low) + T.shift_right(self._chain(zero, w[half:], high), isa.splat(4))
            )
        w = self.weights(weight, panel, block)
        return T.bind(self._chain(start, w[:half], low) + self._chain(zero, w[half:], high))

    def _chain(self, start: Expr, weights: Sequence[Expr], planes: Sequence[Sequence[Expr]]) -> Expr:
        """start + the dot of some groups, for one token."""
        return self.dots([start], weights, [planes])[0]

    def dots(
        self, starts: Sequence[Expr], weights: Sequence[Expr], tokens: Sequence[Sequence[Sequence[Expr]]]
    ) -> list[Expr]:
        """start + the dot of some groups, for several tokens side by side; tokens: [token][plane][group]."""
        if self.isa.vnni:
            return self._dots_by_group(starts, weights, tokens)
        return self._dots_by_plane(starts, weights, tokens)

    def _dots_by_group(
        self, starts: Sequence[Expr], weights: Sequence[Expr], tokens: Sequence[Sequence[Sequence[Expr]]]
    ) -> list[Expr]:
        """A register for each token and plane: as many chains, of which 10 hide the latency of a product, and a weight
        is used for all of them at once."""
        zero = isa.splat(0)
        states = [[self.products.begin(s if plane == 0 else zero) for plane in range(self.planes)] for s in starts]
        for j, w in enumerate(weights):
            for plane in range(self.planes):
                for state, token in zip(states, tokens, strict=True):
                    state[plane] = self.products.add(state[plane], w, token[plane][j])
        return [T.bind(self.joined([self.products.end(s) for s in state])) for state in states]

    def _dots_by_plane(
        self, starts: Sequence[Expr], weights: Sequence[Expr], tokens: Sequence[Sequence[Sequence[Expr]]]
    ) -> list[Expr]:
        """The highest plane comes first and its sums start the next one's, so that a token needs one register."""
        sums: list[Expr] = []
        for plane in reversed(range(self.planes)):
            begins = starts if plane == 0 else [isa.splat(0)] * len(starts)
            if sums:
                begins = [T.bind(b + T.shift_left(s, isa.splat(8))) for b, s in zip(begins, sums, strict=True)]
            states = [self.products.begin(b) for b in begins]
            for j, w in enumerate(weights):
                states = [self.products.add(s, w, t[plane][j]) for s, t in zip(states, tokens, strict=True)]
            sums = [self.products.end(s) for s in states]
        return sums

    def accumulate(self, acc: Expr, dot: Expr, d: Expr, m: Expr | None, scale: Expr, correction: Expr) -> Expr:
        """One block's step of the sum; scale and correction are the activations' scalars."""
        if m is not None:
            acc = isa.fma(m, isa.splat(correction), acc)
        return isa.fma(T.cast(dot, isa.F32), d * isa.splat(scale), acc)
