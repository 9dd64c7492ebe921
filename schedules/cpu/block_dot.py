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

Activations of 8 bits beside weights of 4 have an offset c in each block: they are stored as x - c, so that 254 steps
reach from the least value to the greatest, wherever zero lies: a block leans to one side as soon as one value stands
out. With 8 bits everywhere SmolLM2-135M's greedy choice then differs from float32's half as often (1.3 % of tokens, for
2.4 %). The dot of c takes the block's sum of weights; added up byte by byte over the groups, that is a ninth group of
weights, which c multiplies as another word of activations.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

from tilewright.compiler.composites import LinearSpec
from tilewright.models.quant.base import BLOCK
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.int8_dot import Dot, State, dot_for
from tilewright.schedules.cpu.isa import LANES, Buffer, Expr, Isa, T

BLOCK_KERNEL_FORMATS = ("q4_0", "q4_1", "q8_0")
LINE_BYTES = 64
# How far ahead of their use weights are asked for: some 600 ns of products of 8 tokens. Without it such a product took
# 1.3 (weights in the third-level cache) to 1.9 times as long (in memory) on Emerald Rapids; 5 to 20 KiB are alike.
AHEAD_BYTES = 10240
GROUPS = BLOCK // 4  # groups of 4 inputs in a block: one dot-product instruction each
_SMALLEST = 1e-30  # a block whose magnitudes are all below counts as zero: greatest / amax must stay finite
_GREATEST = {8: 127, 16: 127 * 256 + 127}  # magnitude of an activation, by bits: the high byte never leaves int8
_STEPS = 254  # from the least activation to the greatest where there is an offset
assert max(_GREATEST.values()) * BLOCK * (255 + 128) < 2**29

_Step = tuple[list[Expr], int]  # the weights of a group by panel, and its number


@dataclass(frozen=True)
class QuantizedBlock:
    """values: two int32x16 as they are stored; offset: int32, what is to be added to them, or None; scale: float32;
    total: int32, the sum of the whole activations."""

    values: list[Expr]
    offset: Expr | None
    scale: Expr
    total: Expr


def quantize_block(values: Sequence[Expr], bits: int) -> QuantizedBlock:
    """Two float32x16, rounded to multiples of their magnitude / greatest. Ties go to even."""
    q, scale, _ = _rounded(values, T.bind(isa.max_magnitude(values)), _GREATEST[bits])
    return QuantizedBlock(q, None, scale, isa.sum_lanes_i32(q[0] + q[1]))


def quantize_block_with_offset(values: Sequence[Expr]) -> QuantizedBlock:
    """Two float32x16, rounded to multiples of the distance between the least and the greatest (or zero) / 254.

    Ties round to even, so that the integers may be 255 apart.
    """
    least, greatest = isa.extremes(values)
    q, scale, inverse = _rounded(values, isa.settled(greatest - least, "float32"), _STEPS)
    lowest = T.bind(T.cast(isa.lane(isa.round_even(isa.splat(least * inverse)), 0), "int32"))
    offset = isa.settled(T.min(lowest + 128, T.int32(127)))
    return QuantizedBlock([T.bind(v - isa.splat(offset)) for v in q], offset, scale, isa.sum_lanes_i32(q[0] + q[1]))


def _rounded(values: Sequence[Expr], extent: Expr, steps: int) -> tuple[list[Expr], Expr, Expr]:
    """values / (extent / steps) as integers; extent / steps, steps / extent, or 0 for both where there is no extent."""
    nothing = extent < T.float32(_SMALLEST)  # not so for NaN, which stays visible in the scale
    scale = T.bind(T.Select(nothing, T.float32(0.0), extent * T.float32(1.0 / steps)))
    inverse = T.bind(T.Select(nothing, T.float32(0.0), T.float32(steps) / extent))
    return [T.bind(T.cast(isa.round_even(v * isa.splat(inverse)), isa.I32)) for v in values], scale, inverse


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
    def offset(self) -> bool:
        """Whether activations are stored less an offset. The sums of a group's bytes must fit bytes: 8 * 15 do."""
        return self.has_nibbles and self.activation_bits == 8

    @property
    def groups(self) -> int:
        """Words of activations in a plane, and vectors of weights that multiply them."""
        return GROUPS + self.offset

    @property
    def has_minimum(self) -> bool:
        return self.name == "q4_1"

    @property
    def has_nibbles(self) -> bool:
        return self.name != "q8_0"

    def quantize(self, values: Sequence[Expr]) -> QuantizedBlock:
        """A block of activations, two float32x16."""
        return quantize_block_with_offset(values) if self.offset else quantize_block(values, self.activation_bits)

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
        base = 256 if self.has_nibbles else 512
        d = self._halves(weight, panel, block, base)
        return d, self._halves(weight, panel, block, base + 2 * LANES) if self.has_minimum else None

    def _halves(self, weight: Buffer, panel: Expr, block: Expr, offset: int) -> Expr:
        raw = isa.load(weight, panel, block, offset, lanes=2 * LANES)
        return self.isa.half_to_float(T.reinterpret(f"uint16x{LANES}", raw))

    def prefetch(self, weight: Buffer, panel: Expr, block: Expr) -> None:
        """Ask for what is read AHEAD_BYTES after a block: panels lie one after the other."""
        panels, blocks, size = map(int, weight.shape)
        ahead = T.min(panel * blocks + block + AHEAD_BYTES // size, T.int64(panels * blocks - 1))
        flat, at = isa.flat(weight), isa.settled(ahead * size, "int64")
        for line in range(0, size, LINE_BYTES):
            isa.prefetch(flat, at + line)

    def weights(self, weight: Buffer, panel: Expr, block: Expr) -> Iterator[tuple[int, Expr]]:
        """(group, uint8x64) for the groups of a block, for kernels that use them for many tokens; what an offset is
        multiplied with comes last.

        Each is unpacked when its turn comes: the sums of 8 tokens leave too few registers to hold them all.
        """
        total = None
        for group, vector in self._unpacked(weight, panel, block):
            if self.offset:
                total = vector if total is None else T.bind(total + vector)
            yield group, vector
        if self.offset:
            yield GROUPS, total

    def _unpacked(self, weight: Buffer, panel: Expr, block: Expr) -> Iterator[tuple[int, Expr]]:
        if not self.has_nibbles:
            yield from ((j, self._bytes(weight, panel, block, j)) for j in range(GROUPS))
            return
        packed = [isa.load(weight, panel, block, 64 * j, lanes=64) for j in range(GROUPS // 2)]
        for j, v in enumerate(packed):
            yield j, T.bind(T.bitwise_and(v, isa.bytes_of(15)))
            yield j + GROUPS // 2, T.bind(T.bitwise_and(T.shift_right(v, isa.bytes_of(4)), isa.bytes_of(15)))

    def _bytes(self, weight: Buffer, panel: Expr, block: Expr, group: int) -> Expr:
        return T.bind(T.bitwise_xor(isa.load(weight, panel, block, 64 * group, lanes=64), isa.bytes_of(128)))

    @cached_property
    def products(self) -> Dot:
        """How to multiply what `weights` gives."""
        return dot_for(self.isa, 15 if self.has_nibbles else 255)

    def dot(self, weight: Buffer, panel: Expr, block: Expr, x: Sequence[Sequence[Expr]], correction: Expr) -> Expr:
        """The dot of a block for one token; x: by plane, the lowest first, its vectors."""
        half = GROUPS // 2  # two chains hide the latency
        low, high = [plane[:half] for plane in x], [plane[half:GROUPS] for plane in x]
        start, zero = self.start(correction), isa.splat(0)
        if self.has_nibbles and self.isa.vnni and not self.offset:
            # High nibbles need no shift where bytes of any size multiply as fast: their dot is 16-fold, and an exact
            # multiple of 16 below 16 * 15 * BLOCK / 2 * 2^15 < 2^28.
            packed = [isa.load(weight, panel, block, 64 * j, lanes=64) for j in range(half)]
            w = [T.bind(T.bitwise_and(v, isa.bytes_of(mask))) for mask in (0x0F, 0xF0) for v in packed]
            return T.bind(
                self._chain(start, w[:half], low) + T.shift_right(self._chain(zero, w[half:], high), isa.splat(4))
            )
        w = [v for _, v in sorted(self.weights(weight, panel, block), key=itemgetter(0))]
        dot = self._chain(start, w[:half], low) + self._chain(zero, w[half:GROUPS], high)
        return T.bind(dot + self._chain(zero, w[GROUPS:], [x[0][GROUPS:]]) if self.offset else dot)

    def _chain(self, start: Expr, weights: Sequence[Expr], planes: Sequence[Sequence[Expr]]) -> Expr:
        """start + the dot of some groups, for one token."""
        return self.dots([start], [enumerate(weights)], [planes])[0][0]

    def dots(
        self,
        starts: Sequence[Expr],
        weights: Sequence[Iterable[tuple[int, Expr]]],
        tokens: Sequence[Sequence[Sequence[Expr]]],
    ) -> list[list[Expr]]:
        """start + the dot of some groups, side by side for several tokens and panels: [token][panel].

        weights: by panel, what `weights` gives; tokens: [token][plane][group].
        """
        steps = (([w for _, w in parts], parts[0][0]) for parts in zip(*weights, strict=True))
        if self.isa.vnni and len(weights) * self.planes <= 2:
            return self._dots_by_group(starts, len(weights), steps, tokens)
        return self._dots_by_plane(starts, len(weights), list(steps), tokens)

    def _dots_by_group(
        self, starts: Sequence[Expr], panels: int, steps: Iterable[_Step], tokens: Sequence[Sequence[Sequence[Expr]]]
    ) -> list[list[Expr]]:
        """A register for each token, panel and plane: as many chains, of which 10 hide the latency of a product, and a
        weight is used for all of them at once."""
        zeros = [isa.splat(0)] * (self.planes - 1)
        states = [[[self.products.begin(b) for b in (start, *zeros)] for _ in range(panels)] for start in starts]
        for weights, j in steps:
            for plane in range(self.planes):
                for token, x in zip(states, tokens, strict=True):
                    self._add(token, plane, weights, x[plane][j])
        return [[T.bind(self.joined([self.products.end(s) for s in state])) for state in token] for token in states]

    def _dots_by_plane(
        self, starts: Sequence[Expr], panels: int, steps: Sequence[_Step], tokens: Sequence[Sequence[Sequence[Expr]]]
    ) -> list[list[Expr]]:
        """The highest plane comes first and its sums start the next one's: a register for each token and panel."""
        sums: list[list[Expr]] = []
        for plane in reversed(range(self.planes)):
            begins = [[start if plane == 0 else isa.splat(0)] * panels for start in starts]
            if sums:
                begins = [
                    [T.bind(b + T.shift_left(s, isa.splat(8))) for b, s in zip(*both, strict=True)]
                    for both in zip(begins, sums, strict=True)
                ]
            states = [[[self.products.begin(b)] for b in token] for token in begins]
            for weights, j in steps:
                if j == GROUPS:  # sums of bytes fit no register that others have added to, on some machines
                    states = [[[self.products.begin(self.products.end(s))] for (s,) in token] for token in states]
                for token, x in zip(states, tokens, strict=True):
                    self._add(token, 0, weights, x[plane][j])
            sums = [[self.products.end(s) for (s,) in token] for token in states]
        return sums

    def _add(self, states: list[list[State]], plane: int, weights: Sequence[Expr], x: Expr) -> None:
        """One group of a token, for every panel: loaded once."""
        shared = T.bind(x) if len(weights) > 1 else x
        for state, w in zip(states, weights, strict=True):
            state[plane] = self.products.add(state[plane], w, shared)

    def accumulate(self, acc: Expr, dot: Expr, d: Expr, m: Expr | None, scale: Expr, correction: Expr) -> Expr:
        """One block's step of the sum; scale and correction are the activations' scalars."""
        if m is not None:
            acc = isa.fma(m, isa.splat(correction), acc)
        return isa.fma(T.cast(dot, isa.F32), d * isa.splat(scale), acc)
