"""What may happen to a row before a linear: RMS norm, gated activation, or nothing.

One generator for the kernels that fuse it and for those that stand alone, so that both give the same bits.
"""

from dataclasses import dataclass

from tilewright.compiler.composites import GatedSpec, NormSpec
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.isa import LANES, Buffer, Expr, T


def rms_scale(x: Buffer, index: tuple[Expr, ...], features: int, eps: float) -> Expr:
    """1 / sqrt(mean(x^2) + eps) of the `features` elements at x[*index, 0:], a bound scalar.

    The sum is kept in 16 lanes over steps of 16, then folded by a fixed tree: one order for every caller.
    `index` may end in an offset into the last dimension instead: x[*index[:-1], index[-1]:].
    """
    *outer, base = index
    total = isa.registers()
    isa.store(total, isa.splat(0.0), 0)

    def add_squares(values: Expr) -> None:
        isa.store(total, isa.fma(values, values, isa.load(total, 0)), 0)

    with T.serial(0, features // LANES) as step:
        add_squares(isa.load(x, *outer, base + step * LANES))
    if rest := features % LANES:
        add_squares(isa.load_part(x, rest, *outer, base + features - rest))
    mean = isa.fma_scalar(isa.sum_lanes(isa.load(total, 0)), T.float32(1.0 / features), T.float32(eps))
    return T.bind(T.float32(1.0) / T.sqrt(mean))


@dataclass(frozen=True)
class Prologue:
    """The row transformation of a linear with `features` inputs; `norm` and `gated` exclude each other."""

    features: int
    norm: NormSpec | None = None
    gated: GatedSpec | None = None

    def __post_init__(self) -> None:
        if self.norm and self.gated:
            raise ValueError("a linear's prologue is a norm or a gated activation, not both")
        if self.norm and self.norm.features != self.features:
            raise ValueError(f"a norm over {self.norm.features} features can't feed a linear of {self.features}")
        if self.gated and self.gated.features != self.features:
            raise ValueError(f"a gated activation of {self.gated.features} can't feed a linear of {self.features}")
        if self.gated and self.gated.activation not in isa.ACTIVATIONS:
            raise ValueError(f"activation {self.gated.activation!r} is none of {', '.join(isa.ACTIVATIONS)}")

    @property
    def trivial(self) -> bool:
        return self.norm is None and self.gated is None

    @property
    def in_width(self) -> int:
        """Columns of x: gate and up stand side by side."""
        return 2 * self.features if self.gated else self.features

    @property
    def suffix(self) -> str:
        """For kernel names."""
        return "_norm" if self.norm else f"_{self.gated.activation}" if self.gated else ""

    def begin_row(self, x: Buffer, row: Expr) -> Expr | None:
        """What has to be known of the whole row first."""
        return rms_scale(x, (row, 0), self.features, self.norm.eps) if self.norm else None

    def values(
        self, x: Buffer, weight: Buffer | None, state: Expr | None, row: Expr, k: Expr, count: int = LANES
    ) -> Expr:
        """Elements k .. k + count of the transformed row (zeros up to 16 lanes). `weight`: the norm's, [features]."""

        def read(buffer: Buffer, *index: Expr) -> Expr:
            return isa.load(buffer, *index) if count == LANES else isa.load_part(buffer, count, *index)

        if self.norm:
            return T.bind(read(x, row, k) * isa.splat(state) * read(weight, k))
        if self.gated:
            gate = isa.ACTIVATIONS[self.gated.activation](read(x, row, k))
            return T.bind(gate * read(x, row, k + self.features))
        return read(x, row, k)

    def write_row(self, x: Buffer, weight: Buffer | None, row: Expr, y: Buffer) -> None:
        """y[row, :] = the transformed row."""
        state = self.begin_row(x, row)
        with T.serial(0, self.features // LANES) as step:
            isa.store(y, self.values(x, weight, state, row, step * LANES), row, step * LANES)
        if rest := self.features % LANES:
            first = self.features - rest
            isa.store_part(y, self.values(x, weight, state, row, first, rest), rest, row, first)
