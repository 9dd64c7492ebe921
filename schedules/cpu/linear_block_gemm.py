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
from tilewright.schedules.cpu.isa import LANES, Expr, Isa, T
from tilewright.schedules.cpu.linear_common import WEIGHT, LinearFacts, RowEnd, X, linear_floor, match_linear


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
        return [GemmTile(t) for t in ((8, 4, 6, 10, 12) if target.has("avx512") else (2, 4, 1, 8))]

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        return linear_floor(facts)

    def apply(self, facts: LinearFacts, tile: GemmTile, target: Target) -> Lowering:
        form = BlockFormat(Isa.of(target), facts.spec.weight_format)
        quantize = quantize_rows(facts, form, tile.tokens)
        gemm = KernelCall(
            _gemm(facts, form, tile),
            ("xq", "scales", "corrections", WEIGHT, *facts.epilogue),
            (Output("y", ("m", facts.n), "float32"),),
        )
        return Lowering((quantize, gemm), ("y",))


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


def _gemm(facts: LinearFacts, form: BlockFormat, tile: GemmTile) -> tirx.PrimFunc:
    blocks = facts.k // BLOCK
    m = isa.rows_symbol()
    with isa.kernel(facts.name(f"gemm{tile.tokens}")) as built:
        xq = isa.argument("xq", (m, facts.k), "int8")
        scales = isa.argument("scales", (m, blocks), "float32")
        corrections = isa.argument("corrections", (m, blocks), form.correction_dtype)
        weight = isa.argument("weight", facts.weight_shape, "uint8")
        end = RowEnd.declare(facts, m)
        words = T.decl_buffer((m * (facts.k // 4),), "int32", data=xq.data)
        scales, corrections = isa.flat(scales), isa.flat(corrections)

        def step(first: Expr, rows: Expr, skip: Expr, count: int, panel: Expr) -> None:
            """`count` rows from `skip` on, of the group of `rows` rows that begins at row `first`."""
            sums = [isa.registers() for _ in range(count)]
            for acc in sums:
                isa.store(acc, isa.splat(0.0), 0)
            with T.serial(0, blocks) as b:
                at = T.bind(first * blocks + b * rows + skip)
                w = form.weights(weight, panel, b)
                d, low = form.scales(weight, panel, b)
                dots = [form.start(corrections[at + i]) for i in range(count)]
                for j in range(GROUPS):
                    for i in range(count):
                        dots[i] = form.isa.dp4(dots[i], w[j], isa.splat(words[(at + i) * GROUPS + j]))
                for i, acc in enumerate(sums):
                    value = form.accumulate(isa.load(acc, 0), dots[i], d, low, scales[at + i], corrections[at + i])
                    isa.store(acc, value, 0)
            for i, acc in enumerate(sums):
                end.write(isa.load(acc, 0), first + skip + i, panel)

        with T.parallel(0, facts.panels) as panel:
            with T.serial(0, m // tile.tokens) as group:
                step(group * tile.tokens, T.int64(tile.tokens), 0, tile.tokens, panel)
            rows = T.bind(m % tile.tokens)
            for count in _smaller(tile.tokens):
                with T.If(T.bitwise_and(rows, T.int64(count)) != 0), T.Then():
                    step(m - rows, rows, T.bind(rows // (2 * count) * (2 * count)), count, panel)
    return built.get()


def _smaller(tokens: int) -> list[int]:
    """The powers of two that any remainder below `tokens` is a sum of, greatest first."""
    return [c for c in (8, 4, 2, 1) if c < tokens]
