"""The most likely tokens of a row, largest first, the lowest token on ties."""

from typing import Any

from tvm.script import tirx as T

from tilewright.schedules.cuda.cluster_gather import ClusterGather
from tilewright.schedules.cuda.sample_candidates import Candidates
from tilewright.schedules.cuda.sample_math import across, place, place_token
from tilewright.schedules.cuda.sample_row import VECTOR, Row


@T.meta_class
class Alternatives:
    """Writes a row of top_ids and top_logprobs: of few candidates, or where there are too many, one pass a token."""

    def __init__(self, pool: Any, row: Row, words: ClusterGather, candidates: Candidates) -> None:
        self.row, self.words, self.list = row, words, candidates
        self.warp_best = pool.alloc((row.layout.warps,), "uint64", align=16)
        self.x = T.alloc_local([VECTOR], "float32")
        self.best = T.alloc_local([2], "uint64")

    @T.inline
    def write_short(self, line, wanted, log_total, top_ids, top_logprobs):
        """From the first block's list."""
        for i in T.unroll(self.list.own):
            at: T.let = self.row.thread + i * self.row.layout.threads
            if at < self.list.length:
                mine: T.uint64 = self.entry(at)
                rank: T.int32 = 0
                for j in T.serial(self.list.length):
                    if self.entry(j) > mine:
                        rank = rank + 1
                if rank < wanted:
                    top_ids[line, rank] = T.cast(self.list.entries[at, 1], "int32")
                    top_logprobs[line, rank] = T.reinterpret("float32", self.list.entries[at, 0]) - log_total

    def entry(self, i: Any) -> Any:
        value = T.reinterpret("float32", self.list.entries[i, 0])
        return place(value, T.cast(self.list.entries[i, 1], "int32"))

    @T.inline
    def write_whole(self, logits, line, wanted, log_total, top_ids, top_logprobs):
        """By all blocks: each the first of those after the one before."""
        self.best[1] = T.bitwise_not(T.uint64(0))
        for a in T.serial(wanted):
            self.best[0] = T.uint64(0)
            for step in T.serial(self.row.layout.steps, unroll=4):
                self.row.read(self.x, step)
                for j in T.unroll(VECTOR):
                    mine: T.uint64 = place(self.x[j], self.row.first + self.row.at + step * 128 + j)
                    if mine < self.best[1]:
                        self.best[0] = T.max(self.best[0], mine)
            for s in T.unroll(5):
                self.best[0] = T.max(self.best[0], across(self.best[0], 16 >> s))
            if self.row.lane == 0:
                self.warp_best[self.row.warp] = self.best[0]
            T.cuda.cta_sync()
            if self.row.thread == 0:
                for w in T.unroll(self.row.layout.warps):
                    self.best[0] = T.max(self.best[0], self.warp_best[w])
                self.words.outgoing[0] = T.cast(T.shift_right(self.best[0], T.uint64(32)), "uint32")
                self.words.outgoing[1] = T.cast(T.bitwise_and(self.best[0], T.uint64(0xFFFFFFFF)), "uint32")
            self.words.gather()
            self.best[1] = T.uint64(0)
            for r in T.unroll(self.row.layout.cluster):
                high: T.let = T.shift_left(T.cast(self.words.word(r, 0), "uint64"), T.uint64(32))
                low: T.let = T.cast(self.words.word(r, 1), "uint64")
                self.best[1] = T.max(self.best[1], T.bitwise_or(high, low))
            if T.And(self.words.rank == 0, self.row.thread == 0):
                token: T.int32 = place_token(self.best[1])
                top_ids[line, a] = token
                top_logprobs[line, a] = logits[line, token] - log_total
