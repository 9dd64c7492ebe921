"""Any number of tokens times a block-quantised weight, by int8 dot products.

First the rows are transformed and quantised into scratch (quantized_rows.py), then each thread takes panels of 16
outputs. A step holds one unpacked block of the weight (8 registers), the sums of `tokens` rows as int32 and as float32
(2 * tokens registers), and needs no memory for any of them; both bytes of a 16-bit activation use the same registers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

SERIAL_ROWS = 8  # up to so many rows one thread quantises faster than two that have to be woken for it


@dataclass(frozen=True)
class GemmTile:
    """tokens: rows a step. 8 weights + 2 scales + 2 * tokens sums should fit the machine's registers."""

    tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 16:
            raise ValueError(f"a tile of {self.tokens} tokens is not within 1 to 16")


class LinearBlockGemm(Schedule):
    name = "linear_block_gemm"
    composite = "linear"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> LinearFacts | Reject:
        return match_linear(call, target, BLOCK_KERNEL_FORMATS)

    def space(self, facts: LinearFacts, target: Target) -> Sequence[GemmTile]:
        return [GemmTile(t) for t in ((8, 4, 6, 10, 12) if target.has("avx512") else (8, 4, 2))]

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

    @staticmethod
    def declare(facts: LinearFacts, form: BlockFormat, tokens: int) -> "BlockProduct":
        """Declares the kernel's parameters: x, weight, [norm_weight], [bias], [residual], y; quantises the rows."""
        m, prologue = isa.rows_symbol(), facts.prologue
        x = isa.argument("x", (m, prologue.in_width), "float32")
        weight = isa.argument("weight", facts.weight_shape, "uint8")
        norm = isa.argument("norm_weight", (facts.k,), "float32") if prologue.norm else None
        end = RowEnd.declare(facts, m)
        rows = QuantizedRows.allocate(facts, form, m, tokens)
        rows.fill(x, norm, SERIAL_ROWS)
        return BlockProduct(rows, weight, end)

    def step(self, first: Expr, rows: Expr, skip: Expr, count: int, panel: Expr) -> None:
        """`count` rows from `skip` on, of the group of `rows` rows that begins at row `first`."""
        form, quantized = self.rows.form, self.rows
        size = quantized.record_words
        sums = [isa.registers() for _ in range(count)]
        for acc in sums:
            isa.store(acc, isa.splat(0.0), 0)
        with T.serial(0, quantized.blocks) as b:
            at = quantized.record(first, rows, b, skip)
            records = [at + i * size for i in range(count)]
            w = form.weights(self.weight, panel, b)
            d, low = form.scales(self.weight, panel, b)
            starts = [form.start(quantized.correction(r)) for r in records]
            dots = form.dots(starts, w, [quantized.vectors(r) for r in records])
            for acc, dot, r in zip(sums, dots, records, strict=True):
                total = form.accumulate(isa.load(acc, 0), dot, d, low, quantized.scale(r), quantized.correction(r))
                isa.store(acc, total, 0)
        for i, acc in enumerate(sums):
            self.end.write(isa.load(acc, 0), first + skip + i, panel)

    def last_group(self, panel: Expr) -> None:
        """The rows after the last whole group, by steps of 8, 4, 2, 1 as their number has these bits."""
        m, tokens = self.rows.m, self.rows.tokens
        rows = T.bind(m % tokens)
        for count in smaller_counts(tokens):
            with T.If(T.bitwise_and(rows, T.int64(count)) != 0), T.Then():
                self.step(m - rows, rows, T.bind(rows // (2 * count) * (2 * count)), count, panel)


def product_call(facts: LinearFacts, func: tirx.PrimFunc) -> KernelCall:
    """The call of a kernel that was declared by BlockProduct."""
    inputs = (X, WEIGHT, *facts.norm_weight, *facts.epilogue)
    return KernelCall(func, inputs, (Output("y", ("m", facts.n), "float32"),))


def _gemm(facts: LinearFacts, form: BlockFormat, tile: GemmTile) -> tirx.PrimFunc:
    with isa.kernel(facts.name(f"gemm{tile.tokens}")) as built:
        product = BlockProduct.declare(facts, form, tile.tokens)
        with T.parallel(0, facts.panels) as panel:
            with T.serial(0, product.rows.m // tile.tokens) as group:
                product.step(group * tile.tokens, T.int64(tile.tokens), 0, tile.tokens, panel)
            product.last_group(panel)
    return built.get()
