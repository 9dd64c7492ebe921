"""Few tokens out of many: every block of a cluster sends its largest to the first one, which finishes alone.

A block's `want`th largest of the threads' maxima bounds the `want`th largest of its tokens from below, and hardly more
tokens than `want` reach it. All blocks' tokens above their bounds hold the row's `want` largest.
"""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import TMABar

from tilewright.schedules.cuda.sample_math import EVERY_LANE, LOWEST, count_up, key, key_value
from tilewright.schedules.cuda.sample_row import VECTOR, Row

CAPACITY = 1024  # candidates of a row
MOST = 64  # the most that may be wanted

# What each block tells of itself, words of a ClusterGather.
PEAK, MASS, LARGEST, FIRST, COUNT, BOUND = range(6)


@T.inline
def count_from(out, keys, size, low, at):
    """out[at] = how many of the warp's keys, `size` a lane, are at least low."""
    out[at] = T.uint32(0)
    for i in T.unroll(size):
        if keys[i] >= low:
            out[at] = out[at] + T.uint32(1)
    out[at] = T.cuda.reduce_add_sync_u32(T.uint32(EVERY_LANE), out[at])


@T.inline
def bisect(keys, size, want, slack, low, high, count):
    """Raises low[0] as far as at least `want` of the warp's keys reach it, or until no more than want + slack do.

    At first count[0] keys reach low[0] and none high[0]; if fewer than `want` do, low[0] stays. Scratch: high[1],
    count[1].
    """
    while T.And(high[0] - low[0] > T.uint32(1), count[0] > want + slack):
        high[1] = low[0] + T.shift_right(high[0] - low[0], T.uint32(1))
        count_from(count, keys, size, high[1], 1)
        if count[1] >= want:
            low[0] = high[1]
            count[0] = count[1]
        else:
            high[0] = high[1]


@T.meta_class
class Candidates:
    """The first block's inbox of (value, token) and what it takes to fill it.

    values, tokens: float32 and int32 [CAPACITY], a part for each block in the order of blocks, unordered within. A
    block that has more than its part holds says so in its count; what it could not send is lost.
    """

    def __init__(self, pool: Any, row: Row, rank: Any) -> None:
        layout = row.layout
        self.row, self.rank, self.cluster = row, rank, layout.cluster
        self.part = CAPACITY // layout.cluster
        self.size = layout.threads // 32  # keys of threads' maxima a lane
        self.maxima = pool.alloc((layout.threads,), "uint32", align=16)
        self.entries = pool.alloc((CAPACITY, 2), "uint32", align=16)
        self.counter = pool.alloc((1,), "int32", align=16)
        if self.cluster > 1:
            self.arrived = TMABar(pool, 1)
        self.keys = T.alloc_local([self.size], "uint32")
        self.low = T.alloc_local([1], "uint32")
        self.high = T.alloc_local([2], "uint32")
        self.count = T.alloc_local([2], "uint32")
        self.address = T.alloc_local([2], "uint32")
        self.own = CAPACITY // layout.threads  # entries of a thread
        self.all_keys = T.alloc_local([CAPACITY // 32], "uint32")
        self.mine = T.alloc_local([self.own, 2], "uint32")
        self.phase = T.local_scalar("int32")
        self.length = T.local_scalar("int32")

    @T.inline
    def init(self):
        self.phase = 0
        if self.cluster > 1:
            self.arrived.init(1)

    @T.inline
    def bound(self, peak, want, floor):
        """low[0]: a key that `want` of the block's tokens reach, if so many are above the key `floor`. peak: the
        thread's largest."""
        # A thread without tokens, or with none but -inf, has the lowest float for its peak.
        self.maxima[self.row.thread] = T.Select(peak > T.float32(LOWEST), key(peak), T.uint32(floor))
        if self.row.thread == 0:
            self.counter[0] = 0
        T.cuda.cta_sync()
        for i in T.unroll(self.size):
            self.keys[i] = self.maxima[self.row.lane + 32 * i]
        self.low[0] = self.keys[0]
        self.high[0] = self.keys[0]
        for i in T.unroll(self.size - 1):
            self.low[0] = T.min(self.low[0], self.keys[i + 1])
            self.high[0] = T.max(self.high[0], self.keys[i + 1])
        T.ptx.redux_sync.min.u32(self.low[0], self.low[0], T.uint32(EVERY_LANE))
        T.ptx.redux_sync.max.u32(self.high[0], self.high[0], T.uint32(EVERY_LANE))
        self.low[0] = T.max(self.low[0], T.uint32(floor))
        self.high[0] = T.max(self.high[0] + T.uint32(1), self.low[0] + T.uint32(1))
        count_from(self.count, self.keys, self.size, self.low[0], 0)
        bisect(self.keys, self.size, want, T.shift_right(want, T.uint32(3)), self.low, self.high, self.count)
        if self.count[0] < want:
            self.low[0] = T.uint32(floor)

    @T.inline
    def offer(self, peak):
        """Sends what reaches low[0] to the first block; after the block's next barrier counter[0] tells how much."""
        least: T.float32 = key_value(self.low[0])
        if peak >= least:
            for step in T.serial(self.row.layout.steps, unroll=4):
                self.row.read(self.row.x, step)
                for j in T.unroll(VECTOR):
                    token: T.let = self.row.first + self.row.at + step * 128 + j
                    if T.And(self.row.x[j] >= least, token < self.row.layout.vocab):
                        place: T.int32 = count_up(self.counter.ptr_to([0]), 1)
                        if place < self.part:
                            self.put(self.rank * self.part + place, self.row.x[j], token)

    @T.inline
    def put(self, place, value, token):
        """The first block's entries[place] = (value, token)."""
        if self.cluster == 1:
            self.entries[place, 0] = T.reinterpret("uint32", value)
            self.entries[place, 1] = T.cast(token, "uint32")
        else:
            target: T.let = self.entries.ptr_to([place, 0])
            T.ptx["mapa.shared::cluster.u32"](self.address[0], T.cuda.cvta_generic_to_shared(target), T.uint32(0))
            barrier: T.let = self.arrived.ptr_to([0])
            T.ptx["mapa.shared::cluster.u32"](self.address[1], T.cuda.cvta_generic_to_shared(barrier), T.uint32(0))
            T.ptx.st_async.weak.shared__cluster.mbarrier__complete_tx__bytes.v2.b32(
                self.address[0], T.reinterpret("uint32", value), T.cast(token, "uint32"), self.address[1]
            )

    @T.inline
    def receive(self, words):
        """In the first block: waits for what all sent. words: a ClusterGather with each block's COUNT and BOUND.

        Afterwards low[0] is the highest of the bounds.
        """
        self.low[0] = T.uint32(0)
        self.count[0] = T.uint32(0)
        for r in T.unroll(self.cluster):
            self.low[0] = T.max(self.low[0], words.word(r, BOUND))
            self.count[0] = self.count[0] + T.min(words.word(r, COUNT), T.uint32(self.part))
        if self.cluster > 1:
            if self.row.thread == 0:
                T.ptx.mbarrier.arrive.expect_tx.shared.b64(self.arrived.ptr_to([0]), self.count[0] * T.uint32(8))
            T.cuda.mbarrier_wait_acquire_cluster(self.arrived.ptr_to([0]), self.phase)
            self.phase = self.phase ^ 1

    @T.inline
    def raise_bound(self, words, want):
        """low[0] = the key of the `want`th largest candidate; as it was where fewer reach it."""
        groups: T.let = self.part // 32
        for i in T.unroll(CAPACITY // 32):
            self.all_keys[i] = T.uint32(0)
            if T.cast(self.row.lane + i % groups * 32, "uint32") < words.word(i // groups, COUNT):
                self.all_keys[i] = key(T.reinterpret("float32", self.entries[i * 32 + self.row.lane, 0]))
        self.high[0] = self.low[0]
        for i in T.unroll(CAPACITY // 32):
            self.high[0] = T.max(self.high[0], self.all_keys[i])
        T.ptx.redux_sync.max.u32(self.high[0], self.high[0], T.uint32(EVERY_LANE))
        self.high[0] = self.high[0] + T.uint32(1)
        count_from(self.count, self.all_keys, CAPACITY // 32, self.low[0], 0)
        bisect(self.all_keys, CAPACITY // 32, want, 0, self.low, self.high, self.count)

    @T.inline
    def keep_largest(self, words):
        """entries[0:length[0]] = the candidates that reach low[0], in any order."""
        if self.row.thread == 0:
            self.counter[0] = 0
        for i in T.unroll(self.own):
            place: T.let = self.row.thread + i * self.row.layout.threads
            self.mine[i, 0] = self.entries[place, 0]
            self.mine[i, 1] = self.entries[place, 1]
        T.cuda.cta_sync()
        for i in T.unroll(self.own):
            place: T.let = self.row.thread + i * self.row.layout.threads
            if T.And(
                T.cast(place % self.part, "uint32") < words.word(place // self.part, COUNT),
                key(T.reinterpret("float32", self.mine[i, 0])) >= self.low[0],
            ):
                slot: T.int32 = count_up(self.counter.ptr_to([0]), 1)
                self.entries[slot, 0] = self.mine[i, 0]
                self.entries[slot, 1] = self.mine[i, 1]
        T.cuda.cta_sync()
        self.length = self.counter[0]
