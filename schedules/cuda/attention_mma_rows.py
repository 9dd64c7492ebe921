"""What warps compute for rows of attention by mma.sync: scores, softmax and values, all in registers.

MmaRows are one warp's. SharedRows are the same rows in all warps of a block, which share the work where a block has no
more: each computes the scores of some keys, hands them to the others, and the values of some dimensions. A score and a
value are the same sum in the same order either way, and so are the bits.
"""

from tvm.script import tirx as T

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.schedules.cuda.pairs import PTX_TYPES, pack_pair
from tilewright.schedules.cuda.prefill_rows import Products, Rows

WARPS = 4  # of a block
WARP_ROWS = 16
PAD = 8  # values behind a row of keys or values in shared memory: eight rows that are read at once lie in all banks

_CHUNK_BYTES = 16  # of a row of an 8 x 8 matrix
_LOAD = "ldmatrix.sync.aligned.m8n8.x4.{}shared.b16"


@T.meta_class
class MmaRows(Rows):
    """first_row: in the sequence. first_pair, stride: which pairs of eight dimensions have their values in this warp. A
    lane's part of scores and values is dealt out as wgmma does it for one warp."""

    def __init__(self, spec: PagedAttentionSpec, keys: int, first_row, lane, first_pair=0, stride=1):
        group, dim = spec.attention.heads // spec.attention.kv_heads, spec.attention.head_dim
        super().__init__(spec, Products(dim, WARP_ROWS, keys, spec.dtype), group, first_row, 0, lane)
        kind = PTX_TYPES[spec.dtype]
        self.multiply = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        self.dtype, self.pitch = spec.dtype, (dim + PAD) * 2
        self.first_pair, self.stride, self.pairs = first_pair, stride, dim // 16
        self.turns = -(-self.pairs // stride)
        self.queries = T.alloc_local([dim // 4], "uint32")
        self.operand = T.alloc_local([4], "uint32")
        # Where the lane's rows of four 8 x 8 matrices lie: two of keys by two of dimensions, the latter side by side
        # for keys, the former for values.
        self.key_lane = (lane % 8 + lane // 16 * 8) * self.pitch + lane // 8 % 2 * _CHUNK_BYTES
        self.value_lane = lane % 16 * self.pitch + (lane // 16 + first_pair * 2) * _CHUNK_BYTES

    @T.inline
    def load_queries(self, q, first_token, tokens, first_head):
        """q[t, H, D], of which the rows past the sequence's are zeros."""
        for r in T.unroll(2):
            token: T.let = T.truncdiv(self.row + r * 8, self.tile_heads)
            head: T.let = T.truncmod(self.row + r * 8, self.tile_heads)
            for i in T.unroll(self.dim // 8):
                self.queries[i * 2 + r] = T.uint32(0)
                if token < tokens:
                    T.ptx["ld.global.b32"](
                        self.queries[i * 2 + r],
                        q.ptr_to([first_token + token, first_head + head, i * 8 + self.quad * 2]),
                    )

    @T.inline
    def begin_values(self):
        for i in T.unroll(8 * self.turns):
            self.values[i] = T.float32(0)

    @T.inline
    def rescale_values(self):
        for i in T.unroll(8 * self.turns):
            self.values[i] = self.values[i] * self.rescale[i // 2 % 2]

    @T.inline
    def multiply_keys(self, block):
        """scores = queries . keys, by the address of the block of keys."""
        self.score(block, self.keys // 16)

    @T.inline
    def score(self, block, count):
        """The first scores: of `count` times 16 keys."""
        for i in T.unroll(8 * count):
            self.scores[i] = T.float32(0)
        for step in T.unroll(self.dim // 16):
            for pair in T.unroll(count):
                T.ptx[_LOAD.format("")](
                    *[self.operand[j] for j in range(4)],
                    block + T.cast(self.key_lane + (pair * 16 * self.pitch + step * 2 * _CHUNK_BYTES), "uint32"),
                )
                for side in T.unroll(2):
                    T.ptx[self.multiply](
                        *[self.scores[(pair * 2 + side) * 4 + j] for j in range(4)],
                        *[self.queries[step * 4 + j] for j in range(4)],
                        self.operand[side * 2],
                        self.operand[side * 2 + 1],
                        *[self.scores[(pair * 2 + side) * 4 + j] for j in range(4)],
                    )

    @T.inline
    def multiply_values(self, block):
        """values += weights . block, by its address."""
        for step in T.unroll(self.keys // 16):
            for turn in T.unroll(self.turns):
                if self.first_pair + turn * self.stride < self.pairs:
                    at: T.let = step * 16 * self.pitch + turn * (self.stride * 2 * _CHUNK_BYTES)
                    T.ptx[_LOAD.format("trans.")](
                        *[self.operand[j] for j in range(4)], block + T.cast(self.value_lane + at, "uint32")
                    )
                    for side in T.unroll(2):
                        T.ptx[self.multiply](
                            *[self.values[(turn * 2 + side) * 4 + j] for j in range(4)],
                            *[self.weights[step * 4 + j] for j in range(4)],
                            self.operand[side * 2],
                            self.operand[side * 2 + 1],
                            *[self.values[(turn * 2 + side) * 4 + j] for j in range(4)],
                        )

    @T.inline
    def store(self, out, first_token, tokens, first_head, totals):
        """values / totals to out[t, H, D], for those rows that are among the sequence's."""
        for r in T.unroll(2):
            for i in T.unroll(2):
                totals[r] = totals[r] + self.of_neighbour(totals[r], 1 << i)
            totals[r] = T.float32(1) / totals[r]
            token: T.let = T.truncdiv(self.row + r * 8, self.tile_heads)
            head: T.let = T.truncmod(self.row + r * 8, self.tile_heads)
            for turn in T.unroll(self.turns):
                pair: T.let = self.first_pair + turn * self.stride
                if T.And(token < tokens, pair < self.pairs):
                    for side in T.unroll(2):
                        first: T.let = (turn * 2 + side) * 4 + r * 2
                        pack_pair(
                            self.weights[0],
                            self.values[first] * totals[r],
                            self.values[first + 1] * totals[r],
                            self.dtype,
                        )
                        T.ptx["st.global.b32"](
                            out.ptr_to([first_token + token, first_head + head, pair * 16 + side * 8 + self.quad * 2]),
                            self.weights[0],
                        )


@T.meta_class
class SharedRows(MmaRows):
    """exchange: float32[keys / 8, 32, 4] in shared memory."""

    def __init__(self, spec: PagedAttentionSpec, keys: int, first_row, lane, warp, exchange):
        super().__init__(spec, keys, first_row, lane, warp, WARPS)
        self.warp, self.lane, self.exchange = warp, lane, exchange

    @T.inline
    def multiply_keys(self, block):
        if self.warp < self.keys // 16:
            self.score(block + T.cast(self.warp * (16 * self.pitch), "uint32"), 1)
            for side in T.unroll(2):
                T.ptx["st.shared.v4.f32"](
                    self.exchange.ptr_to([self.warp * 2 + side, self.lane, 0]),
                    *[self.scores[side * 4 + j] for j in range(4)],
                )
        T.cuda.cta_sync()
        for i in T.unroll(self.keys // 8):
            T.ptx["ld.shared.v4.f32"](
                *[self.scores[i * 4 + j] for j in range(4)], self.exchange.ptr_to([i, self.lane, 0])
            )
