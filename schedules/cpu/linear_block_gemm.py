"""Any number of tokens times a block-quantised weight, by int8 dot products.

Two kernels. The first transforms and quantises the rows into groups of `tokens` rows (the last group may be smaller):
group g holds [block][row][32] int8 from element g * tokens * K on, so that the second reads both operands in order.
The second gives each thread panels of 16 outputs; a step holds one unpacked block of the weight (8 registers), the sums
of `tokens` rows as int32 and as float32 (2 * tokens registers), and needs no memory for any of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from tilewright.compiler.targets.base import Target
from tilewright.models.quant.base import BLOCK
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.block_dot import BLOCK_KERNEL_FORMATS, GROUPS, BlockFormat, quantize_block
from tilewright.schedules.cpu.isa import LANES, Buffer, Expr, Isa, T
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
        form = BlockFormat(Isa.of(target), facts.spec.weight_format)
        quantize = quantize_rows(facts, form, tile.tokens)
        return Lowering((quantize, product_call(facts, _gemm(facts, form, tile))), ("y",))


def quantize_rows(facts: LinearFacts, form: BlockFormat, tokens: int) -> KernelCall:
    """x -> xq int8[m, K], scales float32[m, KB], corrections [m, KB], each in groups of `tokens` rows."""
    blocks = facts.k // BLOCK
    prologue = facts.prologue
    m = isa.rows_symbol()
    with isa.kernel(f"quantize{tokens}_{form.name}_k{facts.k}{prologue.suffix}") as built:
        x = isa.argument("x", (m, prologue.in_width), "float32")
        norm = isa.argument("norm_weight", (facts.k,), "float32") if prologue.norm else None
        xq = isa.argument("xq", (m, facts.k), "int8")
        scales = isa.argument("scales", (m, blocks), "float32")
        corrections = isa.argument("corrections", (m, blocks), form.correction_dtype)
        xq, scales, corrections = map(isa.flat, (xq, scales, corrections))
        with T.parallel(0, m) as row:
            first = T.bind(row // tokens * tokens)
            rows = T.bind(T.min(m - first, T.int64(tokens)))
            state = prologue.begin_row(x, row)
            with T.serial(0, blocks) as b:
                values = [prologue.values(x, norm, state, row, b * BLOCK + LANES * h) for h in range(2)]
                q, scale, total = quantize_block(values)
                at = T.bind(first * blocks + b * rows + (row - first))
                for h in range(2):
                    isa.store(xq, T.cast(q[h], "int8x16"), at * BLOCK + LANES * h)
                T.buffer_store(scales, scale, [at])
                T.buffer_store(corrections, form.correction(scale, total), [at])
    outputs = (
        Output("xq", ("m", facts.k), "int8"),
        Output("scales", ("m", blocks), "float32"),
        Output("corrections", ("m", blocks), form.correction_dtype),
    )
    return KernelCall(built.get(), (X, *facts.norm_weight), outputs)


@dataclass(frozen=True)
class BlockProduct:
    """The product kernel under construction: its parameters, and the step that all its row counts are made of."""

    facts: LinearFacts
    form: BlockFormat
    m: Expr
    words: Buffer  # the quantised rows, 4 int8 each, in groups (see above)
    scales: Buffer
    corrections: Buffer
    weight: Buffer
    end: RowEnd

    @staticmethod
    def declare(facts: LinearFacts, form: BlockFormat) -> "BlockProduct":
        """Declares the kernel's parameters: xq, scales, corrections, weight, [bias], [residual], y."""
        m, blocks = isa.rows_symbol(), facts.k // BLOCK
        xq = isa.argument("xq", (m, facts.k), "int8")
        scales = isa.argument("scales", (m, blocks), "float32")
        corrections = isa.argument("corrections", (m, blocks), form.correction_dtype)
        weight = isa.argument("weight", facts.weight_shape, "uint8")
        end = RowEnd.declare(facts, m)
        words = T.decl_buffer((m * (facts.k // 4),), "int32", data=xq.data)
        return BlockProduct(facts, form, m, words, isa.flat(scales), isa.flat(corrections), weight, end)

    def step(self, first: Expr, rows: Expr, skip: Expr, count: int, panel: Expr) -> None:
        """`count` rows from `skip` on, of the group of `rows` rows that begins at row `first`."""
        form, blocks = self.form, self.facts.k // BLOCK
        sums = [isa.registers() for _ in range(count)]
        for acc in sums:
            isa.store(acc, isa.splat(0.0), 0)
        with T.serial(0, blocks) as b:
            at = T.bind(first * blocks + b * rows + skip)
            w = form.weights(self.weight, panel, b)
            d, low = form.scales(self.weight, panel, b)
            states = [form.products.begin(form.start(self.corrections[at + i])) for i in range(count)]
            for j in range(GROUPS):
                for i in range(count):
                    x = isa.splat(self.words[(at + i) * GROUPS + j])
                    states[i] = form.products.add(states[i], w[j], x)
            for i, acc in enumerate(sums):
                here = self.scales[at + i], self.corrections[at + i]
                isa.store(acc, form.accumulate(isa.load(acc, 0), form.products.end(states[i]), d, low, *here), 0)
        for i, acc in enumerate(sums):
            self.end.write(isa.load(acc, 0), first + skip + i, panel)

    def last_group(self, tokens: int, panel: Expr) -> None:
        """The rows after the last whole group, by steps of 8, 4, 2, 1 as their number has these bits."""
        rows = T.bind(self.m % tokens)
        for count in smaller_counts(tokens):
            with T.If(T.bitwise_and(rows, T.int64(count)) != 0), T.Then():
                self.step(self.m - rows, rows, T.bind(rows // (2 * count) * (2 * count)), count, panel)


def product_call(facts: LinearFacts, func: tirx.PrimFunc) -> KernelCall:
    """The call of a product kernel after `quantize_rows`."""
    inputs: tuple[int | str, ...] = ("xq", "scales", "corrections", WEIGHT, *facts.epilogue)
    return KernelCall(func, inputs, (Output("y", ("m", facts.n), "float32"),))


def _gemm(facts: LinearFacts, form: BlockFormat, tile: GemmTile) -> tirx.PrimFunc:
    with isa.kernel(facts.name(f"gemm{tile.tokens}")) as built:
        product = BlockProduct.declare(facts, form)
        with T.parallel(0, facts.panels) as panel:
            with T.serial(0, product.m // tile.tokens) as group:
                product.step(group * tile.tokens, T.int64(tile.tokens), 0, tile.tokens, panel)
            product.last_group(tile.tokens, panel)
    return built.get()
