"""The threshold of top-k or top-p among all tokens of a row: a search whose every pass reads the row.

A pass measures seven thresholds at once, as counts or as masses of the tokens that reach them, and leaves an eighth of
the range of keys. Masses are sums of one fixed order, and so grow with what they hold: no pass contradicts another.
"""

from typing import Any

from tvm.script import tirx as T

from tilewright.schedules.cuda.cluster_gather import WORDS, ClusterGather
from tilewright.schedules.cuda.sample_math import between, exp, key_value
from tilewright.schedules.cuda.sample_row import VECTOR, Row, warp_sum

PROBES = WORDS - 1


@T.meta_class
class Threshold:
    """low[0]: the key of the largest threshold that leaves a count, or a mass."""

    def __init__(self, pool: Any, row: Row, words: ClusterGather) -> None:
        self.row, self.words, self.warps = row, words, row.layout.warps
        self.partial = pool.alloc((self.warps, WORDS), "float32", align=16)
        self.low = T.alloc_local([1], "uint32")
        self.high = T.alloc_local([1], "uint32")
        self.probe = T.alloc_local([PROBES], "float32")
        self.sums = T.alloc_local([PROBES], "float32")
        self.x = T.alloc_local([VECTOR], "float32")
        self.total = T.local_scalar("float32")

    @T.inline
    def search(self, measured, peak, wanted):
        """Tokens of keys from low[0] on, and none from high[0] on, are `wanted` or more by what `measured` says: the
        number of tokens, or the weights e^(score - peak). If they are fewer low[0] stays.

        Counts are floats too, exact up to 2^24.
        """
        goal: T.float32 = wanted  # which may be an expression of `total`
        while self.high[0] - self.low[0] > T.uint32(1):
            for i in T.unroll(PROBES):
                self.probe[i] = key_value(between(self.low[0], self.high[0], i + 1))
            self.measure(measured, peak)
            low: T.uint32 = self.low[0]
            high: T.uint32 = self.high[0]
            for i in T.unroll(PROBES):
                self.sum_up(i)
                if self.total >= goal:
                    self.low[0] = between(low, high, i + 1)
                else:
                    self.high[0] = T.min(self.high[0], between(low, high, i + 1))

    @T.inline
    def total_mass(self, peak, least_score):
        """total = the weights of what reaches a score, summed as `search` sums."""
        for i in T.unroll(PROBES):
            self.probe[i] = least_score
        self.measure("mass", peak)
        self.sum_up(0)

    @T.inline
    def sum_up(self, i):
        self.total = T.float32(0)
        for r in T.unroll(self.row.layout.cluster):
            self.total = self.total + self.words.number(r, i)

    @T.inline
    def measure(self, measured, peak):
        """Gathers what reaches each probe."""
        for i in T.unroll(PROBES):
            self.sums[i] = T.float32(0)
        for step in T.serial(self.row.layout.steps, unroll=4):
            self.row.read(self.x, step)
            for j in T.unroll(VECTOR):
                weight: T.float32 = exp(self.x[j] - peak) if measured == "mass" else T.float32(1)
                for i in T.unroll(PROBES):
                    if self.x[j] >= self.probe[i]:
                        self.sums[i] = self.sums[i] + weight
        for i in T.unroll(PROBES):
            warp_sum(self.sums, i)
        if self.row.lane == 0:
            for i in T.unroll(PROBES):
                self.partial[self.row.warp, i] = self.sums[i]
        T.cuda.cta_sync()
        if self.row.thread < PROBES:
            total: T.float32 = T.float32(0)
            for w in T.unroll(self.warps):
                total = total + self.partial[w, self.row.thread]
            self.words.send(self.row.thread, total)
        self.words.gather()
