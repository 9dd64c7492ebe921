"""The arithmetic of block-quantised linears, shared by all their kernels so that they agree bit for bit.

A row of activations becomes int8 blocks of 32 with a scale s each. For a block of weights with scale d (and minimum m):

    dot = sum of q * x over the block            exact, int32
    q4_1: acc = fma(m, s * sum x, acc); acc = fma(float(dot), d * s, acc)
    q4_0, q8_0: acc = fma(float(dot), d * s, acc)

in increasing K from acc = 0. The dot-product instruction wants unsigned weights: q4_0 uses q as it is stored (0..15)
and starts the dot at -8 sum x, q8_0 uses q + 128 and starts at -128 sum x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tilewright.models.quant.base import BLOCK
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.int8_dot import Dot, dot_for
from tilewright.schedules.cpu.isa import LANES, Buffer, Expr, Isa, T

BLOCK_KERNEL_FORMATS = ("q4_0", "q4_1", "q8_0")
GROUPS = BLOCK // 4  # groups of 4 inputs in a block: one dot-product instruction each
_SMALLEST = 1e-30  # a block whose magnitudes are all below counts as zero: 127 / amax must stay finite


def quantize_block(values: Sequence[Expr]) -> tuple[list[Expr], Expr, Expr]:
    """Two float32x16 -> two int32x16 in -127..127, the scale amax / 127, and their int32 sum. Ties go to even."""
    amax = T.bind(isa.max_magnitude(values))
    nothing = amax < T.float32(_SMALLEST)  # not so for NaN, which stays visible in the scale
    scale = T.bind(T.Select(nothing, T.float32(0.0), amax * T.float32(1.0 / 127.0)))
    inverse = T.bind(T.Select(nothing, T.float32(0.0), T.float32(127.0) / amax))
    q = [T.bind(T.cast(isa.round_even(v * isa.splat(inverse)), isa.I32)) for v in values]
    return q, scale, isa.sum_lanes_i32(q[0] + q[1])


@dataclass(frozen=True)
class BlockFormat:
    """How a kernel reads one weight format."""

    isa: Isa
    name: str  # of BLOCK_KERNEL_FORMATS

    @property
    def correction_dtype(self) -> str:
        """Type of the third number of an activation block (see `correction`)."""
        return "float32" if self.has_minimum else "int32"

    @property
    def has_minimum(self) -> bool:
        return self.name == "q4_1"

    @property
    def _nibbles(self) -> bool:
        return self.name != "q8_0"

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

    def dot(self, weight: Buffer, panel: Expr, block: Expr, x: Sequence[Expr], correction: Expr) -> Expr:
        """The dot of a block for one token; x: its 8 int32, each 4 packed int8."""
        vectors = [isa.splat(word) for word in x]
        if self._nibbles and self.isa.vnni:
            return self._dot_in_place(weight, panel, block, vectors, self.start(correction))
        w = self.weights(weight, panel, block)
        half = GROUPS // 2  # two chains hide the latency
        chains = [self._chain(self.start(correction), w[:half], vectors[:half])]
        chains.append(self._chain(isa.splat(0), w[half:], vectors[half:]))
        return T.bind(chains[0] + chains[1])

    def _dot_in_place(self, weight: Buffer, panel: Expr, block: Expr, x: list[Expr], start: Expr) -> Expr:
        """High nibbles need no shift where bytes of any size multiply as fast: their dot is 16-fold."""
        half = GROUPS // 2
        packed = [isa.load(weight, panel, block, 64 * j, lanes=64) for j in range(half)]
        low, high = ([T.bind(T.bitwise_and(v, isa.bytes_of(mask))) for v in packed] for mask in (0x0F, 0xF0))
        shifted = T.shift_right(self._chain(isa.splat(0), high, x[half:]), isa.splat(4))
        return T.bind(self._chain(start, low, x[:half]) + shifted)

    def _chain(self, start: Expr, weights: Sequence[Expr], x: Sequence[Expr]) -> Expr:
        state = self.products.begin(start)
        for w, values in zip(weights, x, strict=True):
            state = self.products.add(state, w, values)
        return self.products.end(state)

    def accumulate(self, acc: Expr, dot: Expr, d: Expr, m: Expr | None, scale: Expr, correction: Expr) -> Expr:
        """One block's step of the sum; scale and correction are the activations' scalars."""
        if m is not None:
            acc = isa.fma(m, isa.splat(correction), acc)
        return isa.fma(T.cast(dot, isa.F32), d * isa.splat(scale), acc)
