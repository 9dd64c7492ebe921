"""What all CPU linears share: the facts of a call, the kernel's parameters, the floor, and the end of a row."""

from dataclasses import dataclass

import numpy as np

from tilewright.compiler.composites import LinearSpec
from tilewright.compiler.targets.base import Target
from tilewright.models.quant import FORMATS
from tilewright.models.quant.base import PANEL, panels
from tilewright.schedules.base import Call, Floor, Reject
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.isa import Buffer, Expr, T
from tilewright.schedules.cpu.prologue import Prologue

X, WEIGHT = 0, 1  # indices of the composite's arguments


@dataclass(frozen=True)
class LinearFacts:
    """One linear. m: its static number of rows, or None. few: whether there are too few rows for matrix tiles."""

    spec: LinearSpec
    m: int | None
    few: bool = False

    @property
    def n(self) -> int:
        return self.spec.out_features

    @property
    def k(self) -> int:
        return self.spec.in_features

    @property
    def panels(self) -> int:
        return panels(self.n)

    @property
    def prologue(self) -> Prologue:
        return Prologue(self.k, self.spec.norm, self.spec.gated)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return FORMATS[self.spec.weight_format].packed_shape(self.n, self.k)

    @property
    def weight_dtype(self) -> str:
        return FORMATS[self.spec.weight_format].packed_dtype

    @property
    def norm_weight(self) -> tuple[int, ...]:
        """Index of the norm's weight among the arguments, if there is one."""
        return (WEIGHT + 1,) if self.spec.norm else ()

    @property
    def epilogue(self) -> tuple[int, ...]:
        """Indices of bias and residual, those that there are."""
        first = WEIGHT + 1 + len(self.norm_weight)
        return tuple(range(first, first + self.spec.bias + self.spec.residual))

    def name(self, kernel: str) -> str:
        """A readable kernel name. Specs that differ only in numbers such as eps share it."""
        tail = "_bias" * self.spec.bias + "_residual" * self.spec.residual
        return f"linear_{self.spec.weight_format}_{kernel}_n{self.n}_k{self.k}{self.prologue.suffix}{tail}"


def match_linear(call: Call, target: Target, formats: tuple[str, ...]) -> LinearFacts | Reject:
    """The checks that no CPU linear can do without."""
    spec = call.spec
    if target.kind != "cpu":
        return Reject(f"needs a cpu target, not {target.kind}")
    if spec.weight_format not in formats:
        return Reject(f"takes weights in {', '.join(formats)}, not {spec.weight_format}")
    block = FORMATS[spec.weight_format].block
    if block > 1 and spec.activation_bits not in (8, 16):
        return Reject(f"takes activations of 8 or 16 bits, not {spec.activation_bits}")
    if spec.in_features % block:
        return Reject(f"{spec.in_features} inputs are no multiple of {spec.weight_format}'s block of {block}")
    try:
        facts = LinearFacts(spec, call.m)
        facts.prologue  # noqa: B018  checks itself
    except ValueError as error:
        return Reject(str(error))
    return facts


def linear_floor(facts: LinearFacts) -> Floor:
    """The weight and its neighbours once; a row of x, y and residual each; two operations a weight."""
    spec = facts.spec
    weight = int(np.prod(facts.weight_shape, dtype=np.int64)) * np.dtype(facts.weight_dtype).itemsize
    return Floor(
        bytes_fixed=weight + 4 * (facts.k * bool(spec.norm) + facts.n * spec.bias),
        bytes_per_row=4 * (facts.prologue.in_width + facts.n * (1 + spec.residual)),
        flops_per_row=2 * facts.n * facts.k,
    )


def smaller_counts(tokens: int) -> list[int]:
    """The powers of two that any remainder below `tokens` is a sum of, greatest first."""
    return [c for c in (8, 4, 2, 1) if c < tokens]


@dataclass(frozen=True)
class RowEnd:
    """y[row, panel] = accumulator (+ bias) (+ residual), in that order, for the outputs of a panel that exist."""

    facts: LinearFacts
    y: Buffer
    bias: Buffer | None
    residual: Buffer | None

    @staticmethod
    def declare(facts: LinearFacts, m: Expr) -> "RowEnd":
        """Declares the last parameters of a kernel: [bias], [residual], y."""
        bias = isa.argument("bias", (facts.n,), "float32") if facts.spec.bias else None
        residual = isa.argument("residual", (m, facts.n), "float32") if facts.spec.residual else None
        return RowEnd(facts, isa.argument("y", (m, facts.n), "float32"), bias, residual)

    def write(self, value: Expr, row: Expr, panel: Expr) -> None:
        """value: the 16 sums of a panel, float32x16."""
        rest = self.facts.n % PANEL
        if not rest:
            self._write_whole(value, row, panel)
            return
        with T.If(panel < self.facts.n // PANEL):
            with T.Then():
                self._write_whole(value, row, panel)
            with T.Else():
                self._write_part(value, row, self.facts.n - rest, rest)

    def _write_whole(self, value: Expr, row: Expr, panel: Expr) -> None:
        column = panel * PANEL
        if self.bias is not None:
            value = value + isa.load(self.bias, column)
        if self.residual is not None:
            value = value + isa.load(self.residual, row, column)
        isa.store(self.y, value, row, column)

    def _write_part(self, value: Expr, row: Expr, column: int, count: int) -> None:
        lanes = isa.registers()
        isa.store(lanes, value, 0)
        with T.serial(0, count) as i:
            result = lanes[i]
            if self.bias is not None:
                result = result + self.bias[column + i]
            if self.residual is not None:
                result = result + self.residual[row, column + i]
            T.buffer_store(self.y, result, [row, column + i])
