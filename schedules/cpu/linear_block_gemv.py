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
from tilewright.schedules.cpu.block_dot import BLOCK_KERNEL_FORMATS, GROUPS, BlockFormat, quantize_block
from tilewright.schedules.cpu.isa import LANES, Isa, T
from tilewright.schedules.cpu.linear_common import WEIGHT, LinearFacts, RowEnd, X, linear_floor, match_linear


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
    form = BlockFormat(machine, facts.spec.weight_format)
    with isa.kernel(facts.name("gemv")) as built:
        x = isa.argument("x", (1, prologue.in_width), "float32")
        weight = isa.argument("weight", facts.weight_shape, "uint8")
        norm = isa.argument("norm_weight", (facts.k,), "float32") if prologue.norm else None
        end = RowEnd.declare(facts, 1)

        xq = T.alloc_buffer((facts.k,), "int8")
        scales = T.alloc_buffer((blocks,), "float32")
        corrections = T.alloc_buffer((blocks,), form.correction_dtype)
        words = T.decl_buffer((facts.k // 4,), "int32", data=xq.data)

        state = prologue.begin_row(x, 0)
        with T.serial(0, blocks) as b:
            values = [prologue.values(x, norm, state, 0, b * BLOCK + LANES * h) for h in range(2)]
            q, scale, total = quantize_block(values)
            for h in range(2):
                isa.store(xq, T.cast(q[h], "int8x16"), b * BLOCK + LANES * h)
            T.buffer_store(scales, scale, [b])
            T.buffer_store(corrections, form.correction(scale, total), [b])

        with T.parallel(0, facts.panels) as panel:
            acc = isa.registers()
            isa.store(acc, isa.splat(0.0), 0)
            with T.serial(0, blocks // tile.unroll) as step:
                for u in range(tile.unroll):
                    b = step * tile.unroll + u
                    dot = form.dot(weight, panel, b, [words[b * GROUPS + j] for j in range(GROUPS)], corrections[b])
                    d, m = form.scales(weight, panel, b)
                    isa.store(acc, form.accumulate(isa.load(acc, 0), dot, d, m, scales[b], corrections[b]), 0)
            end.write(isa.load(acc, 0), 0, panel)
    return built.get()
