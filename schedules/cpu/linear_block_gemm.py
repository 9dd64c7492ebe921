"""Any number of tokens times a block-quantised weight, by int8 dot products.

First the rows are transformed and quantised into scratch (quantized_rows.py), then each thread takes panels of 16
outputs, for a chunk of rows at a time. A step multiplies a block of the weight by `tokens` rows; it keeps their sums
in registers, as int32 for each plane of the activations and as float32, and unpacks weights as they are used. With two
panels a step every word of the activations is loaded once for both of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from tvm import tirx

from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.block_dot import BLOCK_KERNEL_FORMATS, BlockFormat
from tilewright.schedules.cpu.isa import Buffer, Expr, Isa, T
from tilewright.schedules.cpu.linear_common import (
    WEIGHT,
    LinearFacts,
    RowEnd,
    X,
    linear_floor,
    match_linear,
    smaller_counts,
)
from tilewright.schedules.cpu.quantized_rows import QuantizedRows

CHUNK_BYTES = 2**19  # quantised rows that a thread multiplies by all its panels, so that they stay in its cache


@dataclass(frozen=True)
class GemmTile:
    """tokens: rows a step. panels: panels a step, 1 or 2."""

    tokens: int
    panels: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 16:
            raise ValueError(f"a tile of {self.tokens} tokens is not within 1 to 16")
        if self.panels not in (1, 2):
            raise ValueError(f"a tile of {self.panels} panels is neither 1 nor 2")


class LinearBlockGemm(Schedule):
    name = "linear_block_gemm"
    composite = "linear"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> LinearFacts | Reject:
        return match_linear(call, target, BLOCK_KERNEL_FORMATS)

    def space(self, facts: LinearFacts, target: Target) -> Sequence[GemmTile]:
        if target.has("avx512vnni"):
            # What an offset sums up, or two bytes of q8_0, leave too few registers for a second panel.
            form = BlockFormat.of(facts.spec, Isa.of(target))
            panels = (1, 2) if form.offset or (form.planes == 2 and not form.has_nibbles) else (2, 1)
            return [*(GemmTile(8, p) for p in panels), *(GemmTile(t) for t in (4, 6, 10, 12))]
        if target.has("avx512"):
            return [GemmTile(t) for t in (8, 4, 6, 10, 12)]
        # The sums of 8 rows do not fit 16 registers of 256 bits: where two planes share unpacked nibbles that still
        # pays, else it only makes the kernel three times as long to compile.
        nibbles = facts.spec.weight_format != "q8_0"
        return [GemmTile(t) for t in ((8, 4, 2) if nibbles and facts.spec.activation_bits == 16 else (4, 8, 2))]

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        return linear_floor(facts)

    def apply(self, facts: LinearFacts, tile: GemmTile, target: Target) -> Lowering:
        form = BlockFormat.of(facts.spec, Isa.of(target))
        return Lowering((product_call(facts, _gemm(facts, form, tile)),), ("y",))


@dataclass(frozen=True)
class BlockProduct:
    """The kernel under construction: its parameters, and the step that all its row counts are made of."""

    rows: QuantizedRows
    weight: Buffer
    end: RowEnd
    panels: int  # a step

    @staticmethod
    def declare(facts: LinearFacts, form: BlockFormat, tokens: int, panels: int = 1) -> "BlockProduct":
        """Declares the kernel's parameters: x, weight, [norm_weight], [bias], [residual], y; quantises the rows."""
        m, prologue = isa.rows_symbol(), facts.prologue
        x = isa.argument("x", (m, prologue.in_width), "float32")
        weight = isa.argument("weight", facts.weight_shape, "uint8")
        norm = isa.argument("norm_weight", (facts.k,), "float32") if prologue.norm else None
        end = RowEnd.declare(facts, m)
        rows = QuantizedRows.allocate(facts, form, m, tokens)
        rows.fill(x, norm)
        return BlockProduct(rows, weight, end, panels)

    def step(self, first: Expr, rows: Expr, skip: Expr, count: int, panels: Sequence[Expr]) -> None:
        """`count` rows from `skip` on, of the group of `rows` rows that begins at row `first`."""
        form, quantized = self.rows.form, self.rows
        size = quantized.record_words
        sums = [[isa.registers() for _ in panels] for _ in range(count)]
        for acc in chain(*sums):
            isa.store(acc, isa.splat(0.0), 0)
        with T.serial(0, quantized.blocks) as b:
            at = quantized.record(first, rows, b, skip)
            records = [at + i * size for i in range(count)]
            for panel in panels:
                form.prefetch(self.weight, panel, b)
            weights = [form.weights(self.weight, panel, b) for panel in panels]
            starts = [form.start(quantized.correction(r)) for r in records]
            dots = form.dots(starts, weights, [quantized.vectors(r) for r in records])
            scales = [form.scales(self.weight, panel, b) for panel in panels]
            for token, parts, r in zip(sums, dots, records, strict=True):
                scale, correction = quantized.scale(r), quantized.correction(r)
                for acc, dot, (d, low) in zip(token, parts, scales, strict=True):
                    isa.store(acc, form.accumulate(isa.load(acc, 0), dot, d, low, scale, correction), 0)
        for i, token in enumerate(sums):
            for acc, panel in zip(token, panels, strict=True):
                self.end.write(isa.load(acc, 0), first + skip + i, panel)

    @contextmanager
    def tasks(self) -> Iterator[tuple[Expr, Expr, list[Expr]]]:
        """The parallel loop over tasks, each as `task` gives it."""
        count, task = self.deal()
        with T.parallel(0, count) as index:
            yield task(index)

    def deal(self) -> tuple[Expr, Callable[[Expr], tuple[Expr, Expr, list[Expr]]]]:
        """How many tasks there are, and what one is, written down where it is asked for: a chunk of rows times the
        panels of a step, as first row, number of rows, panels.

        Chunks have equally many rows and are whole groups, the last one may end within a group. The panels of a chunk
        follow each other; the last one is done twice where it has no partner.
        """
        tokens, last = self.rows.tokens, self.rows.facts.panels - 1
        m, steps = self.rows.m, last // self.panels + 1
        most = max(1, CHUNK_BYTES // (4 * self.rows.blocks * self.rows.record_words))
        chunks = isa.settled(T.max((m + most - 1) // most, T.int64(1)), "int64")
        size = isa.settled((m + chunks * tokens - 1) // (chunks * tokens) * tokens, "int64")

        def task(index: Expr) -> tuple[Expr, Expr, list[Expr]]:
            first = isa.settled(index // steps * size, "int64")
            panel = T.bind(index % steps * self.panels)
            partner = [isa.settled(T.min(panel + 1, T.int64(last)), "int64")] * (self.panels - 1)
            return first, isa.settled(T.max(T.min(m - first, size), T.int64(0)), "int64"), [panel, *partner]

        return chunks * steps, task

    def last_group(self, end: Expr, rows: Expr, panels: Sequence[Expr]) -> None:
        """The last `rows` rows before row `end`, fewer than a group, by steps of 8, 4, 2, 1 as it has these bits."""
        for count in smaller_counts(self.rows.tokens):
            with T.If(T.bitwise_and(rows, T.int64(count)) != 0), T.Then():
                self.step(end - rows, rows, T.bind(rows // (2 * count) * (2 * count)), count, panels)


def product_call(facts: LinearFacts, func: tirx.PrimFunc) -> KernelCall:
    """The call of a kernel that was declared by BlockProduct."""
    inputs = (X, WEIGHT, *facts.norm_weight, *facts.epilogue)
    return KernelCall(func, inputs, (Output("y", ("m", facts.n), "float32"),))


def _gemm(facts: LinearFacts, form: BlockFormat, tile: GemmTile) -> tirx.PrimFunc:
    with isa.kernel(facts.name(f"gemm{tile.tokens}x{tile.panels}")) as built:
        product = BlockProduct.declare(facts, form, tile.tokens, tile.panels)
        with product.tasks() as (first, rows, panels):
            with T.serial(0, rows // tile.tokens) as group:
                product.step(first + group * tile.tokens, T.int64(tile.tokens), 0, tile.tokens, panels)
            product.last_group(first + rows, rows % tile.tokens, panels)
    return built.get()
