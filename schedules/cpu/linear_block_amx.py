"""Many tokens times a block-quantised weight on matrix tiles (AMX int8).

Groups of 16 rows go through tiles, up to two panels of 16 outputs at a time: a block of 32 inputs is one tile product
for each byte of an activation and each panel, whose sums are stored and scaled as in every other kernel, so the bits
are the same. Nibbles are unpacked into scratch once for all rows of a task, bytes are multiplied where they lie.
Fewer than 16 rows have the kernel of linear_block_gemm, and its steps do the rows after the last whole group.

A processor with AMX spends on a block of 16 tokens and 16 outputs about as long on products (16 cycles), on storing
them (16) and on scaling (32, four vector instructions a token); none of the three overlaps another (measured on Emerald
Rapids), and dot products of vectors alone take 72. Below 16 rows a tile is not full and unpacking eats up the gain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvm import tirx

from tilewright.compiler.targets.base import Target
from tilewright.models.quant.base import BLOCK
from tilewright.schedules.base import Call, Floor, Lowering, Reject, Schedule
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.block_dot import BLOCK_KERNEL_FORMATS, BlockFormat
from tilewright.schedules.cpu.isa import LANES, Buffer, Expr, Isa, T
from tilewright.schedules.cpu.linear_block_gemm import BlockProduct, GemmTile, LinearBlockGemm, product_call
from tilewright.schedules.cpu.linear_common import LinearFacts, linear_floor, match_linear
from tilewright.schedules.cpu.tile_ops import ACTIVATIONS, SUMS, TOKENS, WEIGHTS, AmxTiles, TileOps

_FEW = LinearBlockGemm()


@dataclass(frozen=True)
class AmxTile:
    """depth: blocks of the weight a step, 1 or 2, whose products are under way together; it divides their number.

    panels: of 16 outputs that a task unpacks and that take turns with each group of rows, which stays in the cache.
    """

    depth: int
    panels: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= len(WEIGHTS):
            raise ValueError(
                f"depth {self.depth} is not within 1 to {len(WEIGHTS)}, the tiles that there are for weights"
            )
        if self.panels not in (1, 2):
            raise ValueError(f"a tile of {self.panels} panels is neither 1 nor 2")


class LinearBlockAmx(Schedule):
    name = "linear_block_amx"
    composite = "linear"
    kind = "cpu"
    tile_ops: Callable[[int], TileOps] = AmxTiles

    def match(self, call: Call, target: Target) -> LinearFacts | Reject:
        if not target.has("amx_int8"):
            return Reject("needs the target feature amx_int8")
        if call.m_max < TOKENS:
            return Reject(f"fills tiles of {TOKENS} rows, and there are at most {call.m_max}")
        facts = match_linear(call, target, BLOCK_KERNEL_FORMATS)
        return facts if isinstance(facts, Reject) else replace(facts, few=call.rows < TOKENS)

    def bounds(self, call: Call, target: Target) -> Sequence[int]:
        return (TOKENS - 1,)

    def space(self, facts: LinearFacts, target: Target) -> Sequence[AmxTile | GemmTile]:
        if facts.few:
            return _FEW.space(facts, target)
        return [AmxTile(d, p) for d in (1, 2) if facts.k // BLOCK % d == 0 for p in (2, 1)]

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        return linear_floor(facts)

    def apply(self, facts: LinearFacts, tile: AmxTile | GemmTile, target: Target) -> Lowering:
        if isinstance(tile, GemmTile):
            return _FEW.apply(facts, tile, target)
        form = BlockFormat.of(facts.spec, Isa.of(target))
        return Lowering((product_call(facts, _gemm(facts, form, tile, type(self).tile_ops(form.groups))),), ("y",))


def _gemm(facts: LinearFacts, form: BlockFormat, tile: AmxTile, ops: TileOps) -> tirx.PrimFunc:
    with isa.kernel(facts.name(f"amx{tile.depth}x{tile.panels}")) as built:
        product = BlockProduct.declare(facts, form, TOKENS, tile.panels)
        count, task = product.deal()
        # A stretch of tasks for each thread: configuring tiles and allocating scratch takes as long as some products.
        threads = T.bind(T.cast(T.call_packed("runtime.NumThreads"), "int64"))
        with T.parallel(0, threads) as thread:
            step = _Step.begin(product, tile, ops)
            with T.serial(count * thread // threads, count * (thread + 1) // threads) as index:
                first, rows, panels = task(index)
                step.unpack(panels)
                with T.serial(0, rows // TOKENS) as group:
                    for i, panel in enumerate(panels):
                        step.multiply(first + group * TOKENS, i, panel)
                product.last_group(first + rows, rows % TOKENS, panels)
            ops.end()
    return built.get()


@dataclass(frozen=True)
class _Step:
    """What one thread multiplies with: tiles, the task's weights as bytes [panel][block], sums by tile."""

    product: BlockProduct
    tile: AmxTile
    ops: TileOps
    unpacked: Buffer | None  # uint8, where weights are nibbles
    dots: Buffer  # int32

    @staticmethod
    def begin(product: BlockProduct, tile: AmxTile, ops: TileOps) -> "_Step":
        form, blocks = product.rows.form, product.rows.blocks
        size = tile.panels * blocks * _block_bytes(form)
        unpacked = T.alloc_buffer((size,), "uint8") if form.has_nibbles else None
        dots = T.alloc_buffer((tile.depth * form.planes, TOKENS * LANES), "int32")
        ops.begin()
        return _Step(product, tile, ops, unpacked, dots)

    def unpack(self, panels: Sequence[Expr]) -> None:
        """The panels' nibbles as bytes."""
        if self.unpacked is None:
            return
        form, weight = self.product.rows.form, self.product.weight
        for i, panel in enumerate(panels):
            with T.serial(0, self.product.rows.blocks) as b:
                form.prefetch(weight, panel, b)
                for j, vector in form.weights(weight, panel, b):
                    isa.store(self.unpacked, vector, self._unpacked_at(i, b) + 64 * j, lanes=64)

    def multiply(self, first: Expr, i: int, panel: Expr) -> None:
        """The 16 rows from `first` on times the task's panel i, which is `panel` of all."""
        rows, planes = self.product.rows, self.product.rows.form.planes
        sums = [isa.registers() for _ in range(TOKENS)]
        for acc in sums:
            isa.store(acc, isa.splat(0.0), 0)
        with T.serial(0, rows.blocks // self.tile.depth) as step:
            blocks = [step * self.tile.depth + d for d in range(self.tile.depth)]
            records = [rows.record(first, T.int64(TOKENS), b, 0) for b in blocks]
            for d, (b, record) in enumerate(zip(blocks, records, strict=True)):
                self._products(record, WEIGHTS[d], self._weights_at(i, panel, b), SUMS[d * planes : (d + 1) * planes])
            for d, (b, record) in enumerate(zip(blocks, records, strict=True)):
                self._scale(sums, self.product.weight, panel, b, record, d * planes)
        for token, acc in enumerate(sums):
            self.product.end.write(isa.load(acc, 0), first + token, panel)

    def _products(self, record: Expr, weights: int, place: tuple[Buffer, Expr], totals: Sequence[int]) -> None:
        """A block's products with the activations at `record`, one for each plane, to `dots`."""
        ops, rows = self.ops, self.product.rows
        ops.load(weights, *place, 4 * LANES)
        for plane, total in enumerate(totals):
            activations = ACTIVATIONS[total % len(ACTIVATIONS)]
            ops.load(activations, rows.bytes, record * 4 + plane * BLOCK, rows.record_words * 4)
            ops.zero(total)
            ops.dot(total, activations, weights, signed=self.unpacked is None)
        for total in totals:
            ops.store(total, self.dots, total)

    def _scale(self, sums: Sequence[Buffer], weight: Buffer, panel: Expr, b: Expr, record: Expr, row: int) -> None:
        """Add a block's products, `dots` from `row` on, to the sums."""
        rows, form = self.product.rows, self.product.rows.form
        d, low = form.scales(weight, panel, b)
        for token, acc in enumerate(sums):
            at = record + token * rows.record_words
            scale, correction = rows.scale(at), rows.correction(at)
            dot = form.joined([isa.load(self.dots, row + p, token * LANES) for p in range(form.planes)])
            if self.unpacked is not None:  # what is multiplied as int8 has no offset to start from
                dot = dot + form.start(correction)
            isa.store(acc, form.accumulate(isa.load(acc, 0), T.bind(dot), d, low, scale, correction), 0)

    def _weights_at(self, i: int, panel: Expr, block: Expr) -> tuple[Buffer, Expr]:
        """Where a block's weights lie as bytes."""
        if self.unpacked is not None:
            return self.unpacked, self._unpacked_at(i, block)
        _, blocks, size = map(int, self.product.weight.shape)
        return isa.flat(self.product.weight), (panel * blocks + block) * size

    def _unpacked_at(self, i: int, block: Expr) -> Expr:
        return (i * self.product.rows.blocks + block) * _block_bytes(self.product.rows.form)


def _block_bytes(form: BlockFormat) -> int:
    """An unpacked block of 16 outputs."""
    return form.groups * 4 * LANES
