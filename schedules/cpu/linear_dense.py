"""Any number of tokens times a float32, float16 or bfloat16 weight, in float32.

Each output is one chain acc = fma(w[k], x[k], acc) in increasing k, whatever the number of rows. A step holds the sums
of `tokens` rows by `panels` panels of 16 outputs in registers over all of K; the weight's elements are widened as they
are loaded. A prologue runs before, in a kernel of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from tvm import tirx

from tilewright.compiler.checkpoint import DENSE_FORMATS
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.isa import Expr, Isa, T
from tilewright.schedules.cpu.linear_common import (
    WEIGHT,
    LinearFacts,
    RowEnd,
    X,
    linear_floor,
    match_linear,
    smaller_counts,
)


@dataclass(frozen=True)
class DenseTile:
    """tokens * panels sums are held in registers; `panels` has to divide the weight's panels."""

    tokens: int
    panels: int

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 16 or not 1 <= self.panels <= 4:
            raise ValueError(f"a tile of {self.tokens} tokens by {self.panels} panels is not within 16 by 4")


class LinearDense(Schedule):
    name = "linear_dense"
    composite = "linear"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> LinearFacts | Reject:
        return match_linear(call, target, DENSE_FORMATS)

    def space(self, facts: LinearFacts, target: Target) -> Sequence[DenseTile]:
        if not target.has("avx512"):
            wide = ((4, 1), (2, 2), (8, 1))
        elif facts.spec.weight_format == "f32":
            wide = ((8, 2), (6, 4), (8, 1))
        else:  # four panels keep enough in flight while elements are widened
            wide = ((6, 4), (8, 2), (8, 1))
        return [DenseTile(t, p) for t, p in wide if facts.panels % p == 0]

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        return linear_floor(facts)

    def apply(self, facts: LinearFacts, tile: DenseTile, target: Target) -> Lowering:
        source: int | str = X
        before = []
        if not facts.prologue.trivial:
            output = Output("transformed", ("m", facts.k), "float32")
            before = [KernelCall(_transform(facts), (X, *facts.norm_weight), (output,))]
            source = output.name
        gemm = KernelCall(
            _gemm(facts, tile, Isa.of(target)),
            (source, WEIGHT, *facts.epilogue),
            (Output("y", ("m", facts.n), "float32"),),
        )
        return Lowering((*before, gemm), ("y",))


def _transform(facts: LinearFacts) -> tirx.PrimFunc:
    """The prologue: x [m, K or 2K] -> [m, K]."""
    prologue = facts.prologue
    m = isa.rows_symbol()
    with isa.kernel(f"transform_k{facts.k}{prologue.suffix}") as built:
        x = isa.argument("x", (m, prologue.in_width), "float32")
        norm = isa.argument("norm_weight", (facts.k,), "float32") if prologue.norm else None
        y = isa.argument("y", (m, facts.k), "float32")
        with T.parallel(0, m) as row:
            prologue.write_row(x, norm, row, y)
    return built.get()


def _gemm(facts: LinearFacts, tile: DenseTile, machine: Isa) -> tirx.PrimFunc:
    m = isa.rows_symbol()
    with isa.kernel(facts.name(f"gemm{tile.tokens}x{tile.panels}")) as built:
        x = isa.argument("x", (m, facts.k), "float32")
        weight = isa.argument("weight", facts.weight_shape, facts.weight_dtype)
        end = RowEnd.declare(facts, m)

        def widened(panel: Expr, k: Expr) -> Expr:
            w = isa.load(weight, panel, k, 0)
            if facts.spec.weight_format == "f16":
                return machine.half_to_float(w)
            return machine.brain_to_float(w) if facts.spec.weight_format == "bf16" else w

        def step(first: Expr, count: int, panel: Expr) -> None:
            """Rows first .. first + count, panels panel .. panel + tile.panels."""
            sums = [[isa.registers() for _ in range(tile.panels)] for _ in range(count)]
            for acc in chain.from_iterable(sums):
                isa.store(acc, isa.splat(0.0), 0)
            with T.serial(0, facts.k) as k:
                w = [widened(panel + p, k) for p in range(tile.panels)]
                for i in range(count):
                    value = T.bind(isa.splat(x[first + i, k]))
                    for p, acc in enumerate(sums[i]):
                        isa.store(acc, isa.fma(w[p], value, isa.load(acc, 0)), 0)
            for i in range(count):
                for p, acc in enumerate(sums[i]):
                    end.write(isa.load(acc, 0), first + i, panel + p)

        with T.parallel(0, facts.panels // tile.panels) as group:
            panel = T.bind(group * tile.panels)
            with T.serial(0, m // tile.tokens) as tokens:
                step(tokens * tile.tokens, tile.tokens, panel)
            rows = T.bind(m % tile.tokens)
            for count in smaller_counts(tile.tokens):
                with T.If(T.bitwise_and(rows, T.int64(count)) != 0), T.Then():
                    step(m - rows + T.bind(rows // (2 * count) * (2 * count)), count, panel)
    return built.get()
