"""Thread blocks of a cluster tell one another a few words: what reductions over a cluster are made of.

Every block sends its words to all others' shared memory (st.async), and a barrier of each receiver counts the bytes. No
block waits for more than the words it needs, and nothing is written to global memory. A cluster of one block keeps its
words to itself, on any GPU.
"""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import TMABar

WORDS = 8  # a block's, 32 bits each


@T.meta_class
class ClusterGather:
    """gather(): every block gets the words of all. Called by all threads of all blocks of a cluster.

    send(i, x): a word, before that, by a thread of the first warp; those that no one sends are stale. word(rank, i):
    what a block of the cluster sent in the latest call. Two calls' words are kept, by turns: a block that is ahead by
    one call does not disturb the one behind.
    """

    def __init__(self, pool: Any, cluster: int, rank: Any, thread: Any) -> None:
        self.cluster, self.rank, self.thread = cluster, rank, thread
        self.outgoing = pool.alloc((WORDS,), "uint32", align=16)
        self.incoming = pool.alloc((2, cluster, WORDS), "uint32", align=16)
        self.arrived = TMABar(pool, 2)
        self.turn = T.local_scalar("int32")
        self.words = T.alloc_local([4], "uint32")
        self.address = T.alloc_local([2], "uint32")

    @T.inline
    def init(self):
        """Once, before the barrier that makes barriers known to the cluster."""
        self.arrived.init(1)
        self.turn = 0

    def word(self, rank: Any, i: int) -> Any:
        return self.incoming[(self.turn + 1) % 2, rank, i]

    def number(self, rank: Any, i: int) -> Any:
        return T.reinterpret("float32", self.word(rank, i))

    @T.inline
    def send(self, i, value):
        self.outgoing[i] = T.reinterpret("uint32", value)

    @T.inline
    def gather(self):
        T.cuda.cta_sync()
        if self.cluster == 1:
            if self.thread < WORDS:
                self.incoming[self.turn % 2, 0, self.thread] = self.outgoing[self.thread]
            T.cuda.cta_sync()
        else:
            if self.thread < 2 * self.cluster:
                half: T.let = self.thread % 2 * 4
                for i in T.unroll(4):
                    self.words[i] = self.outgoing[half + i]
                peer: T.let = T.cast(self.thread // 2, "uint32")
                target: T.let = self.incoming.ptr_to([self.turn % 2, self.rank, half])
                T.ptx["mapa.shared::cluster.u32"](self.address[0], T.cuda.cvta_generic_to_shared(target), peer)
                barrier: T.let = self.arrived.ptr_to([self.turn % 2])
                T.ptx["mapa.shared::cluster.u32"](self.address[1], T.cuda.cvta_generic_to_shared(barrier), peer)
                T.ptx.st_async.weak.shared__cluster.mbarrier__complete_tx__bytes.v4.b32(
                    self.address[0], self.words[0], self.words[1], self.words[2], self.words[3], self.address[1]
                )
            T.cuda.warp_sync()
            if self.thread == 0:
                self.arrived.arrive(self.turn % 2, tx_count=self.cluster * WORDS * 4)
            T.cuda.mbarrier_wait_acquire_cluster(self.arrived.ptr_to([self.turn % 2]), self.turn // 2 % 2)
        self.turn = self.turn + 1
