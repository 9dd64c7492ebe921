"""The draw: the first token, in token order, whose cumulative weight exceeds u times the mass of all.

Sums go up in levels of one fixed order: lanes, vectors, warps, blocks. At each level the part is taken that first takes
the sum beyond the target, or the last with any weight should rounding use up the mass.
"""

from typing import Any

from tvm.script import tirx as T

from tilewright.schedules.cuda.cluster_gather import ClusterGather
from tilewright.schedules.cuda.sample_candidates import Candidates
from tilewright.schedules.cuda.sample_math import (
    ballot,
    below,
    exp,
    highest_lane,
    lowest_lane,
    of_lane,
)
from tilewright.schedules.cuda.sample_row import VECTOR, Row, warp_sum


@T.inline
def running_sum(out, x, lane):
    """out[0] = the sum of x over the lanes up to this one."""
    out[0] = x
    for i in T.unroll(5):
        out[1] = below(out[0], 1 << i)
        if lane >= 1 << i:
            out[0] = out[0] + out[1]


@T.inline
def pick_lane(sums, x, base, target, chosen):
    """chosen[0] = the first lane with weight x > 0 whose running sum takes base beyond target; chosen[1] tells whether
    there is one, and if there is none chosen[0] is the last with weight, or stays."""
    exceeding: T.uint32 = ballot(T.And(x > T.float32(0), base + sums[0] > target))
    weighty: T.uint32 = ballot(x > T.float32(0))
    if exceeding != T.uint32(0):
        chosen[0] = lowest_lane(exceeding)
        chosen[1] = 1
    else:
        if weighty != T.uint32(0):
            chosen[0] = highest_lane(weighty)


@T.meta_class
class ShortDraw:
    """The draw from the few entries that are left in the first block."""

    def __init__(self, candidates: Candidates) -> None:
        self.list, self.row = candidates, candidates.row
        self.weight = T.alloc_local([candidates.own], "float32")
        self.place = T.alloc_local([candidates.own], "int32")
        self.x = T.alloc_local([1], "float32")
        self.sums = T.alloc_local([2], "float32")
        self.chosen = T.alloc_local([2], "int32")
        self.mass = T.alloc_local([1], "float32")

    @T.inline
    def sort_by_token(self, peak):
        """Entries in the order of their tokens, with weights e^(value - peak) in place of values."""
        for i in T.unroll(self.list.own):
            at: T.let = self.row.thread + i * self.row.layout.threads
            if at < self.list.length:
                self.weight[i] = exp(T.reinterpret("float32", self.list.entries[at, 0]) - peak)
                self.list.mine[i, 1] = self.list.entries[at, 1]
                self.place[i] = 0
                for j in T.serial(self.list.length):
                    if self.list.entries[j, 1] < self.list.mine[i, 1]:
                        self.place[i] = self.place[i] + 1
        T.cuda.cta_sync()
        for i in T.unroll(self.list.own):
            if self.row.thread + i * self.row.layout.threads < self.list.length:
                self.list.entries[self.place[i], 0] = T.reinterpret("uint32", self.weight[i])
                self.list.entries[self.place[i], 1] = self.list.mine[i, 1]
        T.cuda.cta_sync()

    @T.inline
    def load(self, turn):
        self.x[0] = T.float32(0)
        if turn * 32 + self.row.lane < self.list.length:
            self.x[0] = T.reinterpret("float32", self.list.entries[turn * 32 + self.row.lane, 0])

    @T.inline
    def measure(self):
        """mass[0] = the sum of all weights."""
        self.mass[0] = T.float32(0)
        for turn in T.serial((self.list.length + 31) // 32):
            self.load(turn)
            running_sum(self.sums, self.x[0], self.row.lane)
            self.mass[0] = self.mass[0] + of_lane(self.sums[0], 31)

    @T.inline
    def filter(self, top_p, min_p):
        """Weights that top-p and min-p leave out become 0; the greatest weight is 1."""
        least: T.float32 = top_p * self.mass[0]
        for i in T.unroll(self.list.own):
            at: T.let = self.row.thread + i * self.row.layout.threads
            if at < self.list.length:
                self.weight[i] = T.reinterpret("float32", self.list.entries[at, 0])
                self.sums[0] = T.float32(0)
                for j in T.serial(self.list.length):
                    other: T.float32 = T.reinterpret("float32", self.list.entries[j, 0])
                    if other > self.weight[i]:
                        self.sums[0] = self.sums[0] + other
                if T.And(top_p < T.float32(1), T.And(self.sums[0] > T.float32(0), self.sums[0] >= least)):
                    self.weight[i] = T.float32(0)
                if self.weight[i] < min_p:
                    self.weight[i] = T.float32(0)
        T.cuda.cta_sync()
        for i in T.unroll(self.list.own):
            at: T.let = self.row.thread + i * self.row.layout.threads
            if at < self.list.length:
                self.list.entries[at, 0] = T.reinterpret("uint32", self.weight[i])
        T.cuda.cta_sync()

    @T.inline
    def draw(self, u, token):
        """token[0], in every thread."""
        self.measure()
        target: T.float32 = u * self.mass[0]
        base: T.float32 = T.float32(0)
        turn: T.int32 = 0
        self.chosen[1] = 0
        while T.And(self.chosen[1] == 0, turn * 32 < self.list.length):
            self.load(turn)
            running_sum(self.sums, self.x[0], self.row.lane)
            self.chosen[0] = -1
            pick_lane(self.sums, self.x[0], base, target, self.chosen)
            if self.chosen[0] >= 0:
                token[0] = T.cast(self.list.entries[turn * 32 + self.chosen[0], 1], "int32")
            base = base + of_lane(self.sums[0], 31)
            turn = turn + 1


@T.meta_class
class WholeDraw:
    """The draw from all tokens of the row at or above a score and a weight. All blocks take part."""

    def __init__(self, pool: Any, row: Row, words: ClusterGather) -> None:
        self.row, self.words, layout = row, words, row.layout
        self.warps, self.cluster = layout.warps, layout.cluster
        self.warp_mass = pool.alloc((self.warps,), "float32", align=16)
        self.sums = T.alloc_local([2], "float32")
        self.x = T.alloc_local([VECTOR], "float32")
        self.chosen = T.alloc_local([2], "int32")
        self.mass = T.alloc_local([1], "float32")
        self.base = T.alloc_local([1], "float32")

    @T.inline
    def weigh(self, step, peak, least_score, least_weight):
        """x = the weights of the thread's vector of a step, 0 for tokens that are left out."""
        self.row.read(self.x, step)
        for j in T.unroll(VECTOR):
            score: T.float32 = self.x[j]
            self.x[j] = exp(score - peak)
            if T.Or(score < least_score, self.x[j] < least_weight):
                self.x[j] = T.float32(0)

    @T.inline
    def draw(self, u, peak, least_score, least_weight, token):
        """token[0] >= 0 in all threads of one warp of one block."""
        self.mass[0] = T.float32(0)
        for step in T.serial(self.row.layout.steps, unroll=4):
            self.weigh(step, peak, least_score, least_weight)
            for j in T.unroll(VECTOR):
                self.mass[0] = self.mass[0] + self.x[j]
        warp_sum(self.mass, 0)
        if self.row.lane == 0:
            self.warp_mass[self.row.warp] = self.mass[0]
        T.cuda.cta_sync()
        if self.row.thread == 0:
            self.mass[0] = T.float32(0)
            for w in T.unroll(self.warps):
                self.mass[0] = self.mass[0] + self.warp_mass[w]
            self.words.send(0, self.mass[0])
        self.words.gather()
        self.mass[0] = T.float32(0)
        for r in T.unroll(self.cluster):
            self.mass[0] = self.mass[0] + self.words.number(r, 0)
        target: T.float32 = u * self.mass[0]
        self.base[0] = T.float32(0)
        self.pick(self.cluster, lambda r: self.words.number(r, 0), target)
        token[0] = -1
        if self.chosen[0] == self.words.rank:
            self.pick(self.warps, lambda w: self.warp_mass[w], target)
            if self.chosen[0] == self.row.warp:
                self.scan(target, peak, least_score, least_weight, token)

    @T.inline
    def pick(self, count, part, target):
        """chosen[0] = the part that takes base[0] beyond target, or the last with weight; base[0] = what is before."""
        before: T.float32 = self.base[0]
        self.chosen[0] = 0
        self.chosen[1] = 0
        for i in T.unroll(count):
            if T.And(self.chosen[1] == 0, part(i) > T.float32(0)):
                self.chosen[0] = i
                self.base[0] = before
                before = before + part(i)
                if before > target:
                    self.chosen[1] = 1

    @T.inline
    def scan(self, target, peak, least_score, least_weight, token):
        """token[0] of the warp's chunk, which follows on base[0]."""
        step: T.int32 = 0
        self.chosen[1] = 0
        while T.And(self.chosen[1] == 0, step < self.row.layout.steps):
            self.weigh(step, peak, least_score, least_weight)
            weight: T.float32 = self.x[0] + self.x[1] + self.x[2] + self.x[3]
            running_sum(self.sums, weight, self.row.lane)
            self.chosen[0] = -1
            pick_lane(self.sums, weight, self.base[0], target, self.chosen)
            if self.chosen[0] >= 0:
                before: T.float32 = self.base[0] + of_lane(self.sums[0] - weight, self.chosen[0])
                place: T.int32 = 0
                over: T.int32 = 0
                for j in T.unroll(VECTOR):
                    x: T.float32 = of_lane(self.x[j], self.chosen[0])
                    if T.And(over == 0, x > T.float32(0)):
                        place = j
                        before = before + x
                        if before > target:
                            over = 1
                token[0] = self.row.first + self.row.warp * self.row.layout.chunk + step * 128
                token[0] = token[0] + self.chosen[0] * VECTOR + place
            self.base[0] = self.base[0] + of_lane(self.sums[0], 31)
            step = step + 1
