"""What a warpgroup computes for its 64 rows of a prefill tile: scores, softmax, values, all in registers.

A thread has two rows, eight apart, and of every eight columns two that lie side by side, as wgmma deals its result out.
Operations that a compiler could contract are named, since the softmax stands twice in a kernel and must give the same
bits.
"""

import math
from dataclasses import dataclass

from tvm.script import tirx as T

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.schedules.cuda.pairs import PTX_TYPES

CHUNK = 64  # elements of a head's dimension that lie side by side in shared memory: the 128 bytes of a swizzle
MASKED = -float(2**100)  # a power of two: MASKED * scale is exact, and fma(MASKED, scale, -(MASKED * scale)) is 0

_ALL_LANES = 0xFFFFFFFF
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Products:
    """wgmma of 64 rows: scores from queries and keys in shared memory, values from weights in registers.

    Queries and keys lie with the dimension innermost, values are read across it. Matrix descriptors are of PTX ISA
    9.7.16.5.1, in units of 16 bytes: the swizzle of 128 bytes, eight rows (1024 bytes) apart.
    """

    head_dim: int
    rows: int
    keys: int
    dtype: str

    @property
    def chunks(self) -> int:
        return -(-self.head_dim // CHUNK)

    @property
    def query_stride(self) -> int:
        """Between buffers of queries."""
        return self.rows * self.chunks * CHUNK * 2 >> 4

    @property
    def key_stride(self) -> int:
        """Between buffers of keys, or of values."""
        return self.keys * self.chunks * CHUNK * 2 >> 4

    @property
    def row_descriptor(self) -> int:
        return 1 << 62 | (1024 >> 4) << 32 | 1 << 16

    @property
    def value_descriptor(self) -> int:
        """The leading stride is from chunk to chunk."""
        return 1 << 62 | (1024 >> 4) << 32 | (self.keys * CHUNK * 2 >> 4) << 16

    @property
    def score(self) -> str:
        short = PTX_TYPES[self.dtype]
        return f"wgmma.mma_async.sync.aligned.m64n{self.keys}k16.f32.{short}.{short}"

    @property
    def value(self) -> str:
        short = PTX_TYPES[self.dtype]
        return f"wgmma.mma_async.sync.aligned.m64n{self.head_dim}k16.f32.{short}.{short}"


@T.meta_class
class Rows:
    """The registers of a consumer thread, and what is done with them. first_row: of the warpgroup, in the tile."""

    def __init__(self, spec: PagedAttentionSpec, products: Products, tile_heads: int, first_row, warp, lane):
        attention = spec.attention
        self.products, self.keys, self.dim = products, products.keys, attention.head_dim
        self.tile_heads, self.window = tile_heads, attention.window or 0
        self.cap = attention.soft_cap or 0.0
        # exp(x) = 2^(x * log2(e)). A soft cap is cap * tanh(x / cap) = cap - 2 cap / (1 + 2^(x * 2 log2(e) / cap)).
        self.scale = _LOG2E if self.cap else attention.scale * _LOG2E
        self.cap_scale = attention.scale * 2 * _LOG2E / self.cap if self.cap else 0.0
        self.to_short = f"cvt.rn.{PTX_TYPES[spec.dtype]}x2.f32"
        self.first_row, self.row, self.quad = first_row, first_row + warp * 16 + lane // 4, lane % 4
        self.scores = T.alloc_local([self.keys // 2], "float32")
        self.weights = T.alloc_local([self.keys // 4], "uint32")
        self.values = T.alloc_local([self.dim // 2], "float32")
        # Of the two rows: the largest score, the sum of weights, and what a new largest score multiplies sums by.
        self.peak = T.alloc_local([2], "float32")
        self.total = T.alloc_local([2], "float32")
        self.rescale = T.alloc_local([2], "float32")
        self.old_total = T.alloc_local([2], "float32")
        self.part = T.alloc_local([4], "float32")  # two partial results for each row: shorter chains
        self.shift = T.alloc_local([2], "float32")
        self.limit = T.local_scalar("int32")

    @T.inline
    def multiply_keys(self, queries, keys):
        """Begins scores = queries . keys, both by their descriptors."""
        for i in T.unroll(self.dim // 16):
            T.ptx[self.products.score](
                *[self.scores[j] for j in range(self.keys // 2)],
                queries + T.uint64(i // 4 * (self.products.rows * 8) + i % 4 * 2),
                keys + T.uint64(i // 4 * (self.keys * 8) + i % 4 * 2),
                i > 0, 1, 1, 0, 0,
            )  # fmt: skip
        T.ptx["wgmma.commit_group.sync.aligned"]()

    @T.inline
    def multiply_values(self, block, accumulate):
        """Begins values += weights . block, by its descriptor; without += where accumulate is 0."""
        for i in T.unroll(self.keys // 16):
            T.ptx[self.products.value](
                *[self.values[j] for j in range(self.dim // 2)],
                *[self.weights[i * 4 + j] for j in range(4)],
                block + T.uint64(i * 128),
                T.Or(i > 0, accumulate > 0), 1, 1, 1,
            )  # fmt: skip
        T.ptx["wgmma.commit_group.sync.aligned"]()

    @T.inline
    def begin(self):
        """A new tile: no key seen."""
        for r in T.unroll(2):
            self.peak[r] = T.float32(MASKED)
            self.total[r] = T.float32(0)

    @T.inline
    def add_sinks(self, sinks, first_head):
        """A row's sink, as a key without a value that it has seen: one of the lanes that share the row counts it."""
        for r in T.unroll(2):
            self.peak[r] = sinks[first_head + (self.row + r * 8) % self.tile_heads] * T.float32(_LOG2E / self.scale)
            self.total[r] = T.Select(self.quad == 0, T.float32(1), T.float32(0))

    @T.inline
    def softmax(self, offset):
        """Scores to weights, in float32 where the scores were. offset: position of the tile's first token, counted from
        the block's first key."""
        if self.cap > 0:
            self.cap_scores()
        self.mask(offset)
        self.raise_peak()
        self.exponentiate()

    @T.inline
    def cap_scores(self):
        for i in T.unroll(self.keys // 2):
            T.ptx["ex2.approx.ftz.f32"](self.scores[i], self.scores[i] * T.float32(self.cap_scale))
            T.ptx["rcp.approx.ftz.f32"](self.scores[i], self.scores[i] + T.float32(1))
            T.ptx["fma.rn.f32"](self.scores[i], self.scores[i], T.float32(-2 * self.cap), T.float32(self.cap))

    @T.inline
    def mask(self, offset):
        """MASKED for keys after a row's position, or before its window, in blocks that have such."""
        if self.keys - 1 > offset + T.truncdiv(self.first_row, self.tile_heads):
            for r in T.unroll(2):
                self.limit = offset + T.truncdiv(self.row + r * 8, self.tile_heads) - self.quad * 2
                for i in T.unroll(self.keys // 4):
                    if i // 2 * 8 + i % 2 > self.limit:
                        self.scores[i // 2 * 4 + r * 2 + i % 2] = T.float32(MASKED)
        if self.window > 0:
            if offset + T.truncdiv(self.first_row + 63, self.tile_heads) >= self.window:
                for r in T.unroll(2):
                    self.limit = offset + T.truncdiv(self.row + r * 8, self.tile_heads) - self.quad * 2 - self.window
                    for i in T.unroll(self.keys // 4):
                        if i // 2 * 8 + i % 2 <= self.limit:
                            self.scores[i // 2 * 4 + r * 2 + i % 2] = T.float32(MASKED)

    @T.inline
    def raise_peak(self):
        for r in T.unroll(2):
            for s in T.unroll(2):
                self.part[r * 2 + s] = T.max(self.peak[r], self.scores[r * 2 + s])
            for i in T.unroll(1, self.keys // 8):
                for s in T.unroll(2):
                    self.part[r * 2 + s] = T.max(self.part[r * 2 + s], self.scores[i * 4 + r * 2 + s])
            self.part[r * 2] = T.max(self.part[r * 2], self.part[r * 2 + 1])
            for i in T.unroll(2):
                self.part[r * 2] = T.max(self.part[r * 2], self.of_neighbour(self.part[r * 2], 1 << i))
            T.ptx["ex2.approx.ftz.f32"](self.rescale[r], (self.peak[r] - self.part[r * 2]) * T.float32(self.scale))
            self.peak[r] = self.part[r * 2]

    @T.inline
    def exponentiate(self):
        """Scores to exp(score - peak), and their sums to total."""
        for r in T.unroll(2):
            T.ptx["mul.rn.f32"](self.shift[r], self.peak[r], T.float32(-self.scale))
        for i in T.unroll(self.keys // 2):
            T.ptx["fma.rn.f32"](self.scores[i], self.scores[i], T.float32(self.scale), self.shift[i // 2 % 2])
            T.ptx["ex2.approx.ftz.f32"](self.scores[i], self.scores[i])
        for r in T.unroll(2):
            for s in T.unroll(2):
                self.part[r * 2 + s] = self.scores[r * 2 + s]
            for i in T.unroll(1, self.keys // 8):
                for s in T.unroll(2):
                    self.part[r * 2 + s] = self.part[r * 2 + s] + self.scores[i * 4 + r * 2 + s]
            T.ptx["fma.rn.f32"](self.total[r], self.total[r], self.rescale[r], self.part[r * 2] + self.part[r * 2 + 1])

    @T.inline
    def round_weights(self):
        for i in T.unroll(self.keys // 4):
            T.ptx[self.to_short](self.weights[i], self.scores[i * 2 + 1], self.scores[i * 2])

    @T.inline
    def rescale_values(self):
        for i in T.unroll(self.dim // 2):
            self.values[i] = self.values[i] * self.rescale[i // 2 % 2]

    @T.inline
    def store(self, out, first_token, tokens, first_head, totals):
        """values / totals to out[t, H, D], for those rows that are among the tile's tokens."""
        for r in T.unroll(2):
            for i in T.unroll(2):
                totals[r] = totals[r] + self.of_neighbour(totals[r], 1 << i)
            totals[r] = T.float32(1) / totals[r]
            token: T.let = T.truncdiv(self.row + r * 8, self.tile_heads)
            head: T.let = (self.row + r * 8) % self.tile_heads
            if token < tokens:
                for i in T.unroll(self.dim // 8):
                    T.ptx[self.to_short](
                        self.weights[0],
                        self.values[i * 4 + r * 2 + 1] * totals[r],
                        self.values[i * 4 + r * 2] * totals[r],
                    )
                    T.ptx["st.global.b32"](
                        out.ptr_to([first_token + token, first_head + head, i * 8 + self.quad * 2]), self.weights[0]
                    )

    def of_neighbour(self, value, distance):
        """The value of the lane so far away in the quad, which has the same rows."""
        return T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), value, distance, 32, 32)
