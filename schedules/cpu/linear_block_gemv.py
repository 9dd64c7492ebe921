"""One token times a block-quantised weight: one kernel, bound by reading the weight once.

The row is transformed and quantised into scratch first, by one thread (a few microseconds at most); then the panels of
the weight are shared out among threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from tilewright.compiler.targets.base import Target
from tilewright.models.quant.base import BLOCK
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.block_dot import BLOCK_KERNEL_FORMATS, BlockFormat
from tilewright.schedules.cpu.isa import Isa, T
from tilewright.schedules.cpu.linear_common import WEIGHT, LinearFacts, RowEnd, X, linear_floor, match_linear
from tilewright.schedules.cpu.quantized_rows import QuantizedRows


@dataclass(frozen=True)
class GemvTile:
    """unroll: blocks a step of the K loop, a divisor of the number of blocks."""

    unroll: int = 1

    def __post_init__(self) -> None:
        if self.unroll < 1:
            raise ValueError(f"unroll {self.unroll} is below 1")


class LinearBlockGemv(Schedule):
    name = "linear_block_gemv"
    composite = "linear"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> LinearFacts | Reject:
        if call.m != 1:
            return Reject("is for a single row")
        return match_linear(call, target, BLOCK_KERNEL_FORMATS)

    def space(self, facts: LinearFacts, target: Target) -> Sequence[GemvTile]:
        blocks = facts.k // BLOCK
        return [GemvTile(u) for u in (1, 2, 4) if blocks % u == 0]

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        return linear_floor(facts)

    def apply(self, facts: LinearFacts, tile: GemvTile, target: Target) -> Lowering:
        inputs = (X, WEIGHT, *facts.norm_weight, *facts.epilogue)
        call = KernelCall(_kernel(facts, tile, Isa.of(target)), inputs, (Output("y", (1, facts.n), "float32"),))
        return Lowering((call,), ("y",))


def _kernel(facts: LinearFacts, tile: GemvTile, machine: Isa) -> tirx.PrimFunc:
    blocks = facts.k // BLOCK
    prologue = facts.prologue
    form = BlockFormat.of(facts.spec, machine)
    with isa.kernel(facts.name("gemv")) as built:
        x = isa.argument("x", (1, prologue.in_width), "float32")
        weight = isa.argument("weight", facts.weight_shape, "uint8")
        norm = isa.argument("norm_weight", (facts.k,), "float32") if prologue.norm else None
        end = RowEnd.declare(facts, 1)

        row = QuantizedRows.allocate(facts, form, 1, 1)
        row.fill_row(x, norm, 0)
        with T.parallel(0, facts.panels) as panel:
            acc = isa.registers()
            isa.store(acc, isa.splat(0.0), 0)
            with T.serial(0, blocks // tile.unroll) as step:
                for u in range(tile.unroll):
                    b = step * tile.unroll + u
                    at = row.record(0, 1, b, 0)
                    form.prefetch(weight, panel, b)
                    dot = form.dot(weight, panel, b, row.vectors(at), row.correction(at))
                    d, m = form.scales(weight, panel, b)
                    isa.store(acc, form.accumulate(isa.load(acc, 0), dot, d, m, row.scale(at), row.correction(at)), 0)
            end.write(isa.load(acc, 0), 0, panel)
    return built.get()
