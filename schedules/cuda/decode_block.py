"""A warp's share of decode attention: 32 keys against the query heads of one head block, on the matrix units.

Keys are the 16 rows of mma.m16n8k16 and heads its 8 columns, so that few heads waste little. The scores' transpose is
the second operand of the values' product, whose rows are dimensions.
"""

import math
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tilewright.compiler.composites import AttentionSpec, KVFormat
from tilewright.schedules.cuda.decode_nodes import MASKED
from tilewright.schedules.cuda.pairs import PTX_TYPES, pack_pair
from tilewright.schedules.cuda.tma import ROW, ROW_BYTES

STAGE_KEYS = 64
BLOCK_KEYS = 32

_ALL_LANES = 0xFFFFFFFF
_BOTH, _LOW, _HIGH = 0xFFFFFFFF, 0x0000FFFF, 0xFFFF0000
_LOAD = "ldmatrix.sync.aligned.m8n8.x4.{}shared.b16"


@dataclass(frozen=True)
class StageLayout:
    """How the keys of a stage lie in shared memory, and the values behind them, in rows of 128 bytes.

    A piece is the keys that one copy takes: of one page and of one stage. Where a head's dimension is whole rows and a
    piece 16 keys or more, a copy takes all rows of a piece, [piece, chunk, key]; else one chunk of them, [chunk, key].
    """

    head_dim: int
    page_size: int

    @property
    def chunks(self) -> int:
        return -(-self.head_dim // ROW)

    @property
    def piece(self) -> int:
        return math.gcd(self.page_size, STAGE_KEYS)

    @property
    def pieces(self) -> int:
        return STAGE_KEYS // self.piece

    @property
    def joined(self) -> bool:
        return self.head_dim % ROW == 0 and self.piece >= 16

    @property
    def piece_bytes(self) -> int:
        """Of a piece's keys, or values."""
        return self.piece * self.chunks * ROW_BYTES

    @property
    def side_bytes(self) -> int:
        """Of the stage's keys, or values."""
        return self.pieces * self.piece_bytes

    @property
    def chunk_bytes(self) -> int:
        """From a key's chunk to its next."""
        return (self.piece if self.joined else STAGE_KEYS) * ROW_BYTES

    def key_bytes(self, key: int) -> int:
        """From the first key to one that is a multiple of 16."""
        if not self.joined:
            return key * ROW_BYTES
        return key // self.piece * self.piece_bytes + key % self.piece * ROW_BYTES


def exponent(attention: AttentionSpec) -> float:
    """A score's factor in the exponent of 2. With a cap, what is called score is its tanh."""
    return (attention.soft_cap or attention.scale) * math.log2(math.e)


@T.meta_class
class WarpBlock:
    """The first or second (`half`) 32 keys of a stage. `attend` leaves, for the heads pair and pair + 1: `largest`
    score, `total` of the weights, and `product`, the weighted values of dimensions 16 * step + row and 8 more."""

    def __init__(self, attention: AttentionSpec, kv: KVFormat, half: Any, lane: Any) -> None:
        layout = StageLayout(kv.head_dim, kv.page_size)
        self.dtype, self.exponent, self.steps = kv.dtype, exponent(attention), kv.head_dim // 16
        self.capped = attention.soft_cap is not None
        self.cap_scale = 2 * math.log2(math.e) * attention.scale / (attention.soft_cap or math.inf)  # 0 without a cap
        kind = PTX_TYPES[kv.dtype]
        self.multiply = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        self.chunk_bytes, self.tile_bytes = layout.chunk_bytes, layout.key_bytes(16)
        self.side_bytes = layout.side_bytes
        self.lane, self.row, self.pair = lane, lane // 4, lane % 4 * 2
        start = half * layout.key_bytes(BLOCK_KEYS)
        self.key_rows = start + (lane % 8 + lane // 8 % 2 * 8) * ROW_BYTES
        self.value_rows = start + (lane % 8 + lane // 16 * 8) * ROW_BYTES
        self.query = T.alloc_local([2 * self.steps], "uint32")
        self.chains = T.alloc_local([16], "float32")  # scores in two sums, of even and of odd steps
        self.score = T.alloc_local([8], "float32")
        self.operand = T.alloc_local([4], "uint32")
        self.packed = T.alloc_local([4], "uint32")
        self.weight = T.alloc_local([4], "uint32")
        self.kept = T.alloc_local([4], "uint32")  # the bits of a pair of values that count
        self.largest = T.alloc_local([2], "float32")
        self.total = T.alloc_local([2], "float32")
        self.product = T.alloc_local([4 * self.steps], "float32")

    @T.inline
    def load_query(self, queries, slot, heads):
        """The query heads from shared memory [slot, head * head_dim]."""
        for i in T.unroll(2 * self.steps):
            self.query[i] = T.uint32(0)
        if self.row < heads:
            for i in T.unroll(2 * self.steps):
                T.ptx["ld.shared.b32"](
                    self.query[i], queries.ptr_to([slot, self.row * (self.steps * 16) + i * 8 + self.pair])
                )

    @T.inline
    def attend(self, stage, low, high):
        """Over the keys from low up to high of the 32, which may be none. stage: its address in shared memory."""
        for i in T.unroll(4 * self.steps):
            self.product[i] = T.float32(0)
        for e in T.unroll(2):
            self.largest[e] = T.float32(MASKED)
            self.total[e] = T.float32(0)
        if T.And(high > 0, low < BLOCK_KEYS):
            self.multiply_keys(stage)
            if self.capped:
                self.cap_scores()
            for i in T.unroll(4):
                self.kept[i] = T.uint32(_BOTH)
            if T.Or(low > 0, high < BLOCK_KEYS):
                self.mask(low, high)
            self.soften()
            self.multiply_values(stage + T.uint32(self.side_bytes))

    def address(self, base, rows, step, tile, column):
        """Of the lane's row of the matrices at a step of 16 dimensions; tma.py tells of the swizzle."""
        swizzled = T.bitwise_xor(step % 4 * 32 + column * 16, self.lane % 8 * 16)
        return base + T.cast(step // 4 * self.chunk_bytes + tile * self.tile_bytes + rows + swizzled, "uint32")

    @T.inline
    def multiply_keys(self, base):
        for i in T.unroll(16):
            self.chains[i] = T.float32(0)
        for step in T.unroll(self.steps):
            for tile in T.unroll(2):
                T.ptx[_LOAD.format("")](
                    *[self.operand[j] for j in range(4)], self.address(base, self.key_rows, step, tile, self.lane // 16)
                )
                first: T.let = tile * 8 + step % 2 * 4
                T.ptx[self.multiply](
                    *[self.chains[first + j] for j in range(4)],
                    *[self.operand[j] for j in range(4)],
                    self.query[step * 2],
                    self.query[step * 2 + 1],
                    *[self.chains[first + j] for j in range(4)],
                )
        for i in T.unroll(8):
            self.score[i] = self.chains[i // 4 * 8 + i % 4] + self.chains[i // 4 * 8 + 4 + i % 4]

    @T.inline
    def cap_scores(self):
        """tanh(x) = 1 - 2 / (1 + e^2x), absolutely within 3e-7."""
        for i in T.unroll(8):
            T.ptx["ex2.approx.ftz.f32"](self.score[i], self.score[i] * T.float32(self.cap_scale))
            T.ptx["rcp.approx.ftz.f32"](self.score[i], self.score[i] + T.float32(1))
            self.score[i] = T.float32(1) - T.float32(2) * self.score[i]

    @T.inline
    def mask(self, low, high):
        for i in T.unroll(4):
            key: T.let = i * 8 + self.row
            if T.Or(key < low, key >= high):
                self.score[i * 2] = T.float32(MASKED)
                self.score[i * 2 + 1] = T.float32(MASKED)
            pair: T.let = i * 8 + self.pair
            self.kept[i] = T.bitwise_or(
                T.Select(T.And(pair >= low, pair < high), T.uint32(_LOW), T.uint32(0)),
                T.Select(T.And(pair + 1 >= low, pair + 1 < high), T.uint32(_HIGH), T.uint32(0)),
            )

    @T.inline
    def soften(self):
        for e in T.unroll(2):
            self.largest[e] = T.max(
                T.max(self.score[e], self.score[2 + e]), T.max(self.score[4 + e], self.score[6 + e])
            )
        for i in T.unroll(3):
            for e in T.unroll(2):
                self.largest[e] = T.max(self.largest[e], self.of_lane(self.largest[e], 4 << i))
        for i in T.unroll(8):
            T.ptx["ex2.approx.ftz.f32"](self.score[i], (self.score[i] - self.largest[i % 2]) * T.float32(self.exponent))
        for i in T.unroll(4):
            pack_pair(self.packed[i], self.score[i * 2], self.score[i * 2 + 1], self.dtype)
            T.ptx["movmatrix.sync.aligned.m8n8.trans.b16"](self.weight[i], self.packed[i])
        for e in T.unroll(2):
            self.total[e] = (self.score[e] + self.score[2 + e]) + (self.score[4 + e] + self.score[6 + e])
        for i in T.unroll(3):
            for e in T.unroll(2):
                self.total[e] = self.total[e] + self.of_lane(self.total[e], 4 << i)

    def of_lane(self, value, distance):
        return T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), value, distance, 32, 32)

    @T.inline
    def multiply_values(self, base):
        for step in T.unroll(self.steps):
            for tile in T.unroll(2):
                T.ptx[_LOAD.format("trans.")](
                    *[self.operand[j] for j in range(4)],
                    self.address(base, self.value_rows, step, tile, self.lane // 8 % 2),
                )
                T.ptx[self.multiply](
                    *[self.product[step * 4 + j] for j in range(4)],
                    *[T.bitwise_and(self.operand[j], self.kept[tile * 2 + j // 2]) for j in range(4)],
                    self.weight[tile * 2],
                    self.weight[tile * 2 + 1],
                    *[self.product[step * 4 + j] for j in range(4)],
                )
