"""The work list of decode attention, which one kernel makes and another works off; and the fixed tree that it cuts.

    work[0]      (number of parts, 0, ...)
    work[1 + i]  part i, as WORK_ROW int32 named below

Rows past the number of parts are neither written nor to be read. A part is the keys from `first` up to `end` of one
query token; a thread block takes it for one head block at a time: the query heads, at most 8, that read the same keys.
"""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.schedules.base import Output

WORK, PARTIALS, COUNTERS = "decode_work", "decode_partials", "decode_counters"

WORK_ROW = 8  # two vector loads
# The query's row; where its entries begin in page_indices; keys; of how many parts this is which; log2 of the keys of a
# part; the index of the query's first partial.
QUERY, PAGES, FIRST, END, PART, PARTS, LEVEL, PARTIAL = range(WORK_ROW)

# Sums are taken in a fixed tree, whose nodes are aligned at position 0: log2 of the keys of a split, of a group of
# splits, and of a span of groups. A part is a node, or a whole query, so that cutting changes no bit.
LEVELS = (7, 9, 12)
WHOLE = 30  # log2 of more keys than a sequence has
SPLIT_KEYS = 1 << LEVELS[0]

_MAX_HEADS = 8  # the columns of a matrix unit's second operand
_MAX_PARTIALS = 2048  # of all head blocks; more would mean over a million keys in one sequence


@dataclass(frozen=True)
class HeadBlocks:
    """How query heads are dealt out: `units` blocks in all, `blocks` for a KV head, `heads` each but for the last of a
    KV head's, which may have fewer of its `group`."""

    group: int
    heads: int
    blocks: int
    units: int

    @staticmethod
    def of(spec: PagedAttentionSpec) -> "HeadBlocks":
        group = spec.attention.heads // spec.attention.kv_heads
        blocks = -(-group // _MAX_HEADS)
        return HeadBlocks(group, -(-group // blocks), blocks, spec.attention.kv_heads * blocks)

    @property
    def padded(self) -> int:
        """Heads in whole vectors of four."""
        return 4 if self.heads <= 4 else 8

    @property
    def partials(self) -> int:
        """Parts of cut queries that there may be at a time."""
        return min(1023, max(32, _MAX_PARTIALS // self.units))


def vectors(spec: PagedAttentionSpec, threads: int = 128) -> int:
    """Vectors of four heads that each thread holds of a head block's output [head_dim, padded]."""
    return -(-spec.attention.head_dim * HeadBlocks.of(spec).padded // (4 * threads))


def partial_floats(spec: PagedAttentionSpec) -> int:
    """A part's result: each thread's vectors, largest scores, and sums of weights."""
    return 512 * vectors(spec) + 2 * HeadBlocks.of(spec).padded


def plan_outputs(spec: PagedAttentionSpec, m_max: int) -> tuple[Output, Output, Output]:
    """The list for at most m_max queries, and what cut queries need: their parts' results, and how many are done.

    Results and counters are [partial * units + unit]; a query's counters are those of its first partial.
    """
    blocks = HeadBlocks.of(spec)
    count = blocks.partials * blocks.units
    return (
        Output(WORK, (1 + m_max + blocks.partials, WORK_ROW), "int32"),
        Output(PARTIALS, (count, partial_floats(spec)), "float32"),
        Output(COUNTERS, (count,), "int32"),
    )


@T.meta_class
class WorkReader:
    """The parts of one thread block: `part`, for the head block `unit`, until its END is 0; `following` is the next."""

    def __init__(self, work: Any, blocks: HeadBlocks, block: Any, grid: int) -> None:
        self.work, self.blocks, self.grid = work, blocks, grid
        self.part = T.alloc_local([WORK_ROW], "int32")
        self.following = T.alloc_local([WORK_ROW], "int32")
        self.at = T.local_scalar("int32")  # of all parts times head blocks
        self.count = T.local_scalar("int32")
        self.unit = T.local_scalar("int32")
        self.kv_head = T.local_scalar("int32")
        self.first_head = T.local_scalar("int32")
        self.heads = T.local_scalar("int32")
        self.block = block

    @T.inline
    def load_following(self, at):
        for i in T.unroll(2):
            T.ptx["ld.global.v4.b32"](
                *[self.following[i * 4 + j] for j in range(4)],
                self.work.ptr_to([1 + T.truncdiv(at, self.blocks.units), i * 4]),
            )

    @T.inline
    def start(self):
        """The first part. It is loaded with the number of parts, before that tells whether there is one."""
        self.load_following(self.block)
        self.count = self.work[0, 0] * self.blocks.units
        self.at = self.block - self.grid
        if self.block >= self.count:
            # No keys from 0 to 0. What stands behind the list is anything, and might read as keys below 0.
            self.following[FIRST] = 0
            self.following[END] = 0
        self.take()

    @T.inline
    def take(self):
        self.at = self.at + self.grid
        for i in T.unroll(WORK_ROW):
            self.part[i] = self.following[i]
        self.unit = T.truncmod(self.at, self.blocks.units)
        self.kv_head = T.truncdiv(self.unit, self.blocks.blocks)
        self.first_head = T.truncmod(self.unit, self.blocks.blocks) * self.blocks.heads
        self.heads = T.min(self.blocks.heads, self.blocks.group - self.first_head)
        self.first_head = self.first_head + self.kv_head * self.blocks.group
        self.following[END] = 0
        if self.at + self.grid < self.count:
            self.load_following(self.at + self.grid)
