"""Many tokens times a block-quantised weight on matrix tiles (AMX int8).

Groups of 16 rows go through tiles: a panel of the weight is unpacked once into scratch, then each block of 32 inputs is
one tile product for each byte of an activation, whose sums are stored and scaled as in every other kernel, so the bits
are the same. Because of that step after every block, tiles gain little on dot products, and only with many rows: fewer
than `from_rows`, and the rows after the last whole group, take the steps of linear_block_gemm.
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
from tilewright.schedules.cpu.linear_block_gemm import BlockProduct, product_call
from tilewright.schedules.cpu.linear_common import LinearFacts, linear_floor, match_linear
from tilewright.schedules.cpu.tile_ops import ACTIVATIONS, SUMS, TOKENS, WEIGHTS, AmxTiles, TileOps


@dataclass(frozen=True)
class AmxTile:
    """depth: blocks whose tile products are in flight together, a divisor of the number of blocks; with activations of
    16 bits one block has two products and takes all the tiles for sums.

    from_rows: the least number of rows that go through tiles; with fewer, filling tiles costs more than they save.
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
    tile_ops: Callable[[int], TileOps] = AmxTiles

    def match(self, call: Call, target: Target) -> LinearFacts | Reject:
        if not target.has("amx_int8"):
            return Reject("needs the target feature amx_int8")
        if call.m_max < AmxTile.from_rows:
            return Reject(f"pays from {AmxTile.from_rows} rows on, and there are at most {call.m_max}")
        return match_linear(call, target, BLOCK_KERNEL_FORMATS)

    def space(self, facts: LinearFacts, target: Target) -> Sequence[AmxTile]:
        depths = (2, 1) if facts.spec.activation_bits == 8 else (1,)
        return [AmxTile(d) for d in depths if facts.k // BLOCK % d == 0]

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        return linear_floor(facts)

    def apply(self, facts: LinearFacts, tile: AmxTile, target: Target) -> Lowering:
        form = BlockFormat.of(facts.spec, Isa.of(target))
        return Lowering((product_call(facts, _gemm(facts, form, tile, type(self).tile_ops(form.groups))),), ("y",))


def _gemm(facts: LinearFacts, form: BlockFormat, tile: AmxTile, ops: TileOps) -> tirx.PrimFunc:
    blocks = facts.k // BLOCK
    with isa.kernel(facts.name(f"amx{tile.depth}")) as built:
        product = BlockProduct.declare(facts, form, TOKENS)
        with product.tasks() as (first, rows, (panel,)):
            with T.If(product.rows.m >= tile.from_rows):
                with T.Then():
                    unpacked = T.alloc_buffer((blocks * _panel_bytes(form),), "uint8")
                    scales = T.alloc_buffer((blocks, 2, LANES), "float32")
                    _unpack(product, panel, unpacked, scales)
                    ops.begin()
                    with T.serial(0, rows // TOKENS) as group:
                        _group(product, ops, tile, first + group * TOKENS, panel, unpacked, scales)
                    ops.end()
                with T.Else(), T.serial(0, rows // TOKENS * 2) as half:
                    group = T.bind(first + half // 2 * TOKENS)
                    product.step(group, T.int64(TOKENS), half % 2 * (TOKENS // 2), TOKENS // 2, [panel])
            product.last_group(first + rows, rows % TOKENS, [panel])
    return built.get()


def _panel_bytes(form: BlockFormat) -> int:
    """An unpacked block of 16 outputs."""
    return form.groups * 4 * LANES


def _unpack(product: BlockProduct, panel: Expr, unpacked: Buffer, scales: Buffer) -> None:
    """A panel's weights as bytes, its scales and minima as float32."""
    form = product.rows.form
    with T.serial(0, product.rows.blocks) as b:
        for j, vector in form.weights(product.weight, panel, b):
            isa.store(unpacked, vector, b * _panel_bytes(form) + 64 * j, lanes=64)
        for i, vector in enumerate(form.scales(product.weight, panel, b)):
            if vector is not None:
                isa.store(scales, vector, b, i, 0)


def _group(
    product: BlockProduct, ops: TileOps, tile: AmxTile, first: Expr, panel: Expr, unpacked: Buffer, scales: Buffer
) -> None:
    """The 16 rows from `first` on, a panel's outputs."""
    rows, form = product.rows, product.rows.form
    dots = T.alloc_buffer((len(SUMS), TOKENS * LANES), "int32")
    sums = [isa.registers() for _ in range(TOKENS)]
    for acc in sums:
        isa.store(acc, isa.splat(0.0), 0)
    with T.serial(0, rows.blocks // tile.depth) as step:
        records = [rows.record(first, T.int64(TOKENS), step * tile.depth + i, 0) for i in range(tile.depth)]
        for i, record in enumerate(records):
            ops.load(WEIGHTS[i], unpacked, (step * tile.depth + i) * _panel_bytes(form), 4 * LANES)
            for plane in range(form.planes):
                t = i * form.planes + plane
                ops.zero(SUMS[t])
                ops.load(ACTIVATIONS[t], rows.bytes, record * 4 + plane * BLOCK, rows.record_words * 4)
                ops.dot(SUMS[t], ACTIVATIONS[t], WEIGHTS[i])
                ops.store(SUMS[t], dots, t)
        for i, record in enumerate(records):
            b = step * tile.depth + i
            d = isa.load(scales, b, 0, 0)
            low = isa.load(scales, b, 1, 0) if form.has_minimum else None
            for token, acc in enumerate(sums):
                at = record + token * rows.record_words
                scale, correction = rows.scale(at), rows.correction(at)
                parts = [isa.load(dots, i * form.planes + p, token * LANES) for p in range(form.planes)]
                dot = T.bind(form.joined(parts) + form.start(correction))
                isa.store(acc, form.accumulate(isa.load(acc, 0), dot, d, low, scale, correction), 0)
    for token, acc in enumerate(sums):
        product.end.write(isa.load(acc, 0), first + token, panel)
