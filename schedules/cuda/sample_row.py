"""A row of logits, cut into one slice a thread block: loaded once, changed in place, reduced in a fixed order."""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tilewright.schedules.cuda.sample_math import EVERY_LANE, LOWEST, across, exp

VECTOR = 4  # floats of a load
UNROLL = 8  # loads in flight


@dataclass(frozen=True)
class RowLayout:
    """Where tokens are: blocks in order own slices in order, their warps chunks in order, whose vectors of 4 tokens go
    around the lanes. The last tokens of the last slices are beyond the vocabulary."""

    vocab: int
    cluster: int
    threads: int

    @property
    def warps(self) -> int:
        return self.threads // 32

    @property
    def steps(self) -> int:
        """Vectors of a thread."""
        return -(-self.vocab // (self.cluster * self.threads * VECTOR))

    @property
    def chunk(self) -> int:
        """Tokens of a warp."""
        return self.steps * 32 * VECTOR

    @property
    def slice(self) -> int:
        """Tokens of a block."""
        return self.warps * self.chunk


@T.meta_class
class Row:
    """One row's slice in the hands of a block: `scores` float32[slice] in shared memory, or in global memory where
    `origin`, (row, column), tells the place of the first.

    first: the slice's first token. at: the thread's first place in the slice; its vectors follow at distances of 128.
    """

    def __init__(self, layout: RowLayout, scores: Any, origin: tuple, rank: Any, thread: Any) -> None:
        self.layout, self.scores, self.origin = layout, scores, origin
        self.thread, self.warp, self.lane = thread, thread // 32, thread % 32
        self.first = rank * layout.slice
        self.at = self.warp * layout.chunk + self.lane * VECTOR
        self.space = "global" if origin else "shared"
        self.x = T.alloc_local([UNROLL * VECTOR], "float32")

    @T.inline
    def read(self, out, step, offset=0):
        """out[offset:offset+4] = the thread's vector of a step."""
        T.ptx[f"ld.{self.space}.v4.f32"](
            out[offset],
            out[offset + 1],
            out[offset + 2],
            out[offset + 3],
            self.scores.ptr_to(self.index(self.at + step * 128)),
        )

    @T.inline
    def write(self, step, values, offset=0):
        T.ptx[f"st.{self.space}.v4.f32"](
            self.scores.ptr_to(self.index(self.at + step * 128)),
            values[offset],
            values[offset + 1],
            values[offset + 2],
            values[offset + 3],
        )

    @T.inline
    def fetch(self, logits, row, out, step, offset=0):
        """A vector of the logits themselves, -inf beyond the vocabulary."""
        token: T.let = self.first + self.at + step * 128
        for i in T.unroll(VECTOR):
            out[offset + i] = T.float32(-float("inf"))
        if self.layout.vocab % VECTOR == 0:
            if token < self.layout.vocab:
                T.ptx["ld.global.v4.f32"](
                    out[offset], out[offset + 1], out[offset + 2], out[offset + 3], logits.ptr_to([row, token])
                )
        else:
            for i in T.unroll(VECTOR):
                if token + i < self.layout.vocab:
                    out[offset + i] = logits[row, token + i]

    def index(self, at: Any) -> list[Any]:
        """Where a place of the slice is in `scores`."""
        return [self.origin[0], self.origin[1] + at] if self.origin else [at]

    def score(self, at: Any) -> Any:
        """One score of the slice."""
        return self.scores[tuple(self.index(at))]

    @T.inline
    def change(self, at, score):
        self.scores[tuple(self.index(at))] = score

    @T.inline
    def load(self, logits, row, log_sum):
        """scores = logits. log_sum: the thread's largest, at least the lowest float, and its sum of e^(x - that)."""
        log_sum[0] = T.float32(LOWEST)
        log_sum[1] = T.float32(0)
        for turn in T.unroll((self.layout.steps + UNROLL - 1) // UNROLL):
            for i in T.unroll(min(UNROLL, self.layout.steps)):
                if turn * UNROLL + i < self.layout.steps:
                    self.fetch(logits, row, self.x, turn * UNROLL + i, i * VECTOR)
            before: T.float32 = log_sum[0]
            for i in T.unroll(min(UNROLL, self.layout.steps)):
                if turn * UNROLL + i < self.layout.steps:
                    self.write(turn * UNROLL + i, self.x, i * VECTOR)
                    for j in T.unroll(VECTOR):
                        log_sum[0] = T.max(log_sum[0], self.x[i * VECTOR + j])
            log_sum[1] = log_sum[1] * exp(before - log_sum[0])
            for i in T.unroll(min(UNROLL, self.layout.steps)):
                if turn * UNROLL + i < self.layout.steps:
                    for j in T.unroll(VECTOR):
                        log_sum[1] = log_sum[1] + exp(self.x[i * VECTOR + j] - log_sum[0])

    @T.inline
    def divide(self, temperature, peak):
        """scores /= temperature, and the thread's largest of them."""
        peak[0] = T.float32(LOWEST)
        for step in T.serial(self.layout.steps, unroll=4):
            self.read(self.x, step)
            for j in T.unroll(VECTOR):
                self.x[j] = self.x[j] / temperature
                peak[0] = T.max(peak[0], self.x[j])
            self.write(step, self.x)

    @T.inline
    def find(self, value, token):
        """The thread's first token of a value, or one beyond all."""
        token[0] = T.int32(0x7FFFFFFF)
        for step in T.serial(self.layout.steps, unroll=4):
            self.read(self.x, step)
            for j in T.unroll(VECTOR):
                if self.x[j] == value:
                    token[0] = T.min(token[0], self.first + self.at + step * 128 + j)


@T.inline
def warp_largest(x):
    """x[0] = the largest of the warp's."""
    for i in T.unroll(5):
        x[0] = T.max(x[0], across(x[0], 16 >> i))


@T.inline
def warp_sum(x, i):
    """x[i] = the sum of the lanes', in one order."""
    for s in T.unroll(5):
        x[i] = x[i] + across(x[i], 16 >> s)


def warp_lowest(x: Any) -> Any:
    """The lowest of the lanes' int32, none below 0."""
    return T.cast(T.cuda.reduce_min_sync_u32(T.uint32(EVERY_LANE), T.cast(x, "uint32")), "int32")
