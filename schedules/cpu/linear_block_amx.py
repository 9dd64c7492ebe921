"""Many tokens times a block-quantised weight on matrix tiles (AMX int8).

Groups of 16 rows go through tiles: a panel of the weight is unpacked once into scratch, then each block of 32 inputs is
one tile product whose sums are stored and scaled as in every other kernel, so the bits are the same. Because of that
step after every block, tiles gain little on dot products, and only with many rows: fewer than `from_rows`, and the rows
after the last whole group, take the steps of linear_block_gemm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx

from tilewright.compiler.targets.base import Target
from tilewright.models.quant.base import BLOCK
from tilewright.schedules.base import Call, Floor, Lowering, Reject, Schedule
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.block_dot import BLOCK_KERNEL_FORMATS, BlockFormat
from tilewright.schedules.cpu.isa import LANES, Buffer, Expr, Isa, T
from tilewright.schedules.cpu.linear_block_gemm import BlockProduct, product_call, quantize_rows
from tilewright.schedules.cpu.linear_common import LinearFacts, linear_floor, match_linear
from tilewright.schedules.cpu.tile_ops import ACTIVATIONS, SUMS, TOKENS, WEIGHTS, AmxTiles, TileOps

PANEL_BYTES = LANES * BLOCK  # an unpacked block of 16 outputs


@dataclass(frozen=True)
class AmxTile:
    """depth: blocks whose tile products are in flight together, a divisor of the number of blocks.

    from_rows: the least number of rows that go through tiles; at about 64 tiles were measured to overtake dot products.
    """

    depth: int
    from_rows: int = 64

    def __post_init__(self) -> None:
        if self.from_rows < TOKENS:
            raise ValueError(f"{self.from_rows} rows do not fill a tile of {TOKENS}")
        if self.depth not in (1, 2):
            raise ValueError(f"depth {self.depth} is neither 1 nor 2, the tiles that there are for sums")


class LinearBlockAmx(Schedule):
    name = "linear_block_amx"
    composite = "linear"
    kind = "cpu"
    tile_ops: Callable[[], TileOps] = AmxTiles

    def match(self, call: Call, target: Target) -> LinearFacts | Reject:
        if not target.has("amx_int8"):
            return Reject("needs the target feature amx_int8")
        if call.m_max < AmxTile.from_rows:
            return Reject(f"pays from {AmxTile.from_rows} rows on, and there are at most {call.m_max}")
        return match_linear(call, target, BLOCK_KERNEL_FORMATS)

    def space(self, facts: LinearFacts, target: Target) -> Sequence[AmxTile]:
        return [AmxTile(d) for d in (2, 1) if facts.k // BLOCK % d == 0]

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        return linear_floor(facts)

    def apply(self, facts: LinearFacts, tile: AmxTile, target: Target) -> Lowering:
        form = BlockFormat(Isa.of(target), facts.spec.weight_format)
        gemm = product_call(facts, _gemm(facts, form, tile, type(self).tile_ops()))
        return Lowering((quantize_rows(facts, form, TOKENS), gemm), ("y",))


def _gemm(facts: LinearFacts, form: BlockFormat, tile: AmxTile, ops: TileOps) -> tirx.PrimFunc:
    blocks = facts.k // BLOCK
    with isa.kernel(facts.name(f"amx{tile.depth}")) as built:
        product = BlockProduct.declare(facts, form)
        xq = T.decl_buffer((product.m * facts.k,), "int8", data=product.words.data)
        with T.parallel(0, facts.panels) as panel:
            with T.If(product.m >= tile.from_rows):
                with T.Then():
                    unpacked = T.alloc_buffer((blocks * PANEL_BYTES,), "uint8")
                    scales = T.alloc_buffer((blocks, 2, LANES), "float32")
                    _unpack(product, panel, unpacked, scales)
                    ops.begin()
                    with T.serial(0, product.m // TOKENS) as group:
                        _group(product, ops, tile, group * TOKENS, panel, xq, unpacked, scales)
                    ops.end()
                with T.Else(), T.serial(0, product.m // TOKENS * 2) as half:
                    first = T.bind(half // 2 * TOKENS)
                    product.step(first, T.int64(TOKENS), half % 2 * (TOKENS // 2), TOKENS // 2, panel)
            product.last_group(TOKENS, panel)
    return built.get()


def _unpack(product: BlockProduct, panel: Expr, unpacked: Buffer, scales: Buffer) -> None:
    """A panel's weights as bytes, its scales and minima as float32."""
    with T.serial(0, product.facts.k // BLOCK) as b:
        for j, vector in enumerate(product.form.weights(product.weight, panel, b)):
            isa.store(unpacked, vector, b * PANEL_BYTES + 64 * j, lanes=64)
        for i, vector in enumerate(product.form.scales(product.weight, panel, b)):
            if vector is not None:
                isa.store(scales, vector, b, i, 0)


def _group(
    product: BlockProduct,
    ops: TileOps,
    tile: AmxTile,
    first: Expr,
    panel: Expr,
    xq: Buffer,
    unpacked: Buffer,
    scales: Buffer,
) -> None:
    """The 16 rows from `first` on, a panel's outputs."""
    form, blocks = product.form, product.facts.k // BLOCK
    dots = T.alloc_buffer((tile.depth * TOKENS * LANES,), "int32")
    sums = [isa.registers() for _ in range(TOKENS)]
    for acc in sums:
        isa.store(acc, isa.splat(0.0), 0)
    with T.serial(0, blocks // tile.depth) as step:
        for i in range(tile.depth):
            b = step * tile.depth + i
            ops.zero(SUMS[i])
            ops.load(ACTIVATIONS[i], xq, (first * blocks + b * TOKENS) * BLOCK)
            ops.load(WEIGHTS[i], unpacked, b * PANEL_BYTES)
            ops.dot(SUMS[i], ACTIVATIONS[i], WEIGHTS[i])
            ops.store(SUMS[i], dots, i * TOKENS * LANES)
        for i in range(tile.depth):
            b = step * tile.depth + i
            d = isa.load(scales, b, 0, 0)
            low = isa.load(scales, b, 1, 0) if form.has_minimum else None
            at = T.bind(first * blocks + b * TOKENS)
            for row, acc in enumerate(sums):
                scale, correction = product.scales[at + row], product.corrections[at + row]
                dot = T.bind(isa.load(dots, (i * TOKENS + row) * LANES) + form.start(correction))
                isa.store(acc, form.accumulate(isa.load(acc, 0), dot, d, low, scale, correction), 0)
    for row, acc in enumerate(sums):
        product.end.write(isa.load(acc, 0), first + row, panel)
