"""The work list of decode attention, made on the device once a step: its parts, the costly first.

A query is a token of a sequence that generates (`phases` 1). It stays whole unless it is more than a fair share of the
work of all, so that few long ones fill the machine too; else its parts are nodes of the tree's largest level that is
not. Parts of about equal size stand in no fixed order: what one computes does not depend on its place.
"""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import SMEMPool

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import deferred
from tilewright.schedules.cuda.decode_work import LEVELS, SPLIT_KEYS, WHOLE, HeadBlocks, plan_outputs
from tilewright.schedules.cuda.launch import chained

MODES = {"split": LEVELS[0], "group": LEVELS[1], "span": LEVELS[2], "whole": WHOLE}

_THREADS = 256
_WARPS = _THREADS // 32
_WORTH_CUTTING = 2 * SPLIT_KEYS  # no more keys than that take longer in two parts: merging costs more than a split
_CLASSES = 128  # of size: four to a doubling
_ALL_LANES = 0xFFFFFFFF


def _largest_level(limit: Any) -> Any:
    """Of the levels, the largest that is no more keys than `limit`, or the smallest."""
    level = T.int32(LEVELS[0])
    for larger in LEVELS[1:]:
        level = T.Select(limit >= (1 << larger), T.int32(larger), level)
    return level


@T.meta_class
class _Query:
    """One query and how it is cut. A sequence's tokens are its queries, none of them where it is a prompt."""

    def __init__(self, window: int, level: int) -> None:
        """level: log2 of the keys of a part, 0 where it is to be chosen."""
        self.window, self.forced = window, level
        self.row = T.local_scalar("int32")
        self.rows_end = T.local_scalar("int32")
        self.first = T.local_scalar("int32")
        self.end = T.local_scalar("int32")
        self.level = T.local_scalar("int32")
        self.parts = T.local_scalar("int32")
        self.size = T.local_scalar("int32")

    @T.inline
    def find_keys(self, last, cached):
        """first, end: the keys that the query at position `last` reads. size: keys from the split of the first on."""
        self.end = T.min(last + 1, cached)
        self.first = 0
        if self.window > 0:
            self.first = T.max(self.end - self.window, 0)
        self.size = self.end - T.bitwise_and(self.first, -SPLIT_KEYS)

    @T.inline
    def cut(self, limit, crowded):
        """level, parts: as large as `limit` keys allow. crowded: parts of all are too many, so that it stays whole."""
        self.level = self.forced
        if self.forced == 0:
            self.level = T.Select(self.size <= limit, WHOLE, _largest_level(limit))
        self.parts = T.shift_right(self.end - 1, self.level) - T.shift_right(self.first, self.level) + 1
        if T.Or(self.parts == 1, crowded == 1):
            self.level = WHOLE
            self.parts = 1

    def class_of_size(self) -> Any:
        """Of a part; the largest come first."""
        size = T.min(self.size, T.shift_left(1, self.level))
        log = 31 - T.cast(T.clz(size), "int32")
        return T.max(_CLASSES - 1 - log * 4 - T.bitwise_and(T.shift_right(size, T.max(log - 2, 0)), 3), 0)

    def part_begin(self, part: Any) -> Any:
        return T.shift_left(T.shift_right(self.first, self.level) + part, self.level)


@deferred
def plan_kernel(spec: PagedAttentionSpec, target: Target, decode: bool, m_max: int, mode: str, share: float) -> Any:
    """(positions, indptr, page_indptr, kv_len, phases, and plan_outputs, of which it leaves the partials alone).

    decode: every sequence has one token, a generated one; those that pad the step have no keys.
    mode: one of MODES for all queries, or "auto". share: a fair one, in a multiprocessor's even share of all work.
    """
    blocks = HeadBlocks.of(spec)
    work_shape, partials_shape, counters_shape = (output.shape for output in plan_outputs(spec, m_max))
    limit_of_keys = share * blocks.units / target.sms
    pdl = target.has("pdl")

    @T.prim_func
    def plan(
        positions_handle: T.handle,
        indptr_handle: T.handle,
        page_indptr_handle: T.handle,
        kv_len_handle: T.handle,
        phases_handle: T.handle,
        work_handle: T.handle,
        partials_handle: T.handle,
        counters_handle: T.handle,
    ):
        t = T.int32()
        b = T.int32()
        kv_len = T.match_buffer(kv_len_handle, (b,), "int32")
        phases = T.match_buffer(phases_handle, (b,), "int32")
        positions = T.match_buffer(positions_handle, (t,), "int32")
        indptr = T.match_buffer(indptr_handle, (b + 1,), "int32")
        page_indptr = T.match_buffer(page_indptr_handle, (b + 1,), "int32")
        work = T.match_buffer(work_handle, work_shape, "int32")
        T.match_buffer(partials_handle, partials_shape, "float32")
        counters = T.match_buffer(counters_handle, counters_shape, "int32")
        T.device_entry()
        T.cta_id([1])
        warp = T.warp_id([_WARPS])
        lane = T.lane_id([32])
        thread = T.thread_id([_THREADS])
        pool = SMEMPool()
        classes = pool.alloc((_CLASSES,), "int32", align=16)  # parts of each size, then where the next one goes
        sums = pool.alloc((4,), "int32")  # keys of all queries, parts of cut ones, partials given out
        pool.commit()
        query = _Query(spec.attention.window or 0, MODES.get(mode, 0))
        total = T.alloc_local([1], "int32")
        other = T.alloc_local([1], "int32")
        place = T.alloc_local([1], "int32")
        limit = T.alloc_local([1], "int32")
        crowded = T.alloc_local([1], "int32")

        @T.inline
        def each_query(visit):
            sequence: T.int32 = thread
            while sequence < b:
                if decode:
                    query.row = sequence
                    query.rows_end = sequence + 1
                else:
                    query.row = indptr[sequence]
                    query.rows_end = T.Select(phases[sequence] == 1, indptr[sequence + 1], query.row)
                while query.row < query.rows_end:
                    query.find_keys(positions[query.row], kv_len[sequence])
                    if query.end > 0:
                        visit(sequence)
                    query.row = query.row + 1
                sequence = sequence + _THREADS

        @T.inline
        def add_keys(sequence):
            total[0] = total[0] + query.size

        @T.inline
        def count_parts(sequence):
            query.cut(limit[0], crowded[0])
            if query.parts > 1:
                T.evaluate(T.cuda.atomic_add(sums.ptr_to([1]), query.parts))

        @T.inline
        def classify(sequence):
            query.cut(limit[0], crowded[0])
            T.evaluate(T.cuda.atomic_add(classes.ptr_to([query.class_of_size()]), query.parts))

        @T.inline
        def list_parts(sequence):
            query.cut(limit[0], crowded[0])
            partial: T.int32 = 0
            if query.parts > 1:
                partial = T.cuda.atomic_add(sums.ptr_to([2]), query.parts)
            row: T.int32 = T.cuda.atomic_add(classes.ptr_to([query.class_of_size()]), query.parts)
            for part in T.serial(query.parts):
                T.ptx["st.global.v4.b32"](
                    work.ptr_to([row + part, 0]),
                    query.row,
                    page_indptr[sequence],
                    T.max(query.part_begin(part), query.first),
                    T.min(query.part_begin(part + 1) - 1, query.end - 1) + 1,
                )
                T.ptx["st.global.v4.b32"](work.ptr_to([row + part, 4]), part, query.parts, query.level, partial)

        @T.inline
        def place_classes():
            """By one warp: counts of parts become where each class begins in the list."""
            total[0] = 0
            for i in T.unroll(_CLASSES // 32):
                total[0] = total[0] + classes[lane * (_CLASSES // 32) + i]
            place[0] = total[0]
            for i in T.unroll(5):
                other[0] = T.tvm_warp_shuffle_up(T.uint32(_ALL_LANES), total[0], 1 << i, 32, 32)
                if lane >= (1 << i):
                    total[0] = total[0] + other[0]
            if lane == 31:
                work[0, 0] = total[0]
            place[0] = total[0] - place[0] + 1
            for i in T.unroll(_CLASSES // 32):
                other[0] = classes[lane * (_CLASSES // 32) + i]
                classes[lane * (_CLASSES // 32) + i] = place[0]
                place[0] = place[0] + other[0]

        if thread < _CLASSES:
            classes[thread] = 0
        if thread < 4:
            sums[thread] = 0
        total[0] = 0
        crowded[0] = 0
        T.cuda.cta_sync()
        if pdl:
            T.ptx["griddepcontrol.wait"]()
        each_query(add_keys)
        total[0] = T.cuda.warp_sum(total[0])
        if T.And(lane == 0, total[0] > 0):
            T.evaluate(T.cuda.atomic_add(sums.ptr_to([0]), total[0]))
        place[0] = thread
        while place[0] < counters_shape[0]:
            counters[place[0]] = 0
            place[0] = place[0] + _THREADS
        T.cuda.cta_sync()
        limit[0] = T.max(T.cast(T.cast(sums[0], "float32") * T.float32(limit_of_keys), "int32"), _WORTH_CUTTING)
        each_query(count_parts)
        T.cuda.cta_sync()
        crowded[0] = T.Select(sums[1] > blocks.partials, 1, 0)
        each_query(classify)
        T.cuda.cta_sync()
        if warp == 0:
            place_classes()
        T.cuda.cta_sync()
        each_query(list_parts)
        if pdl:
            # Not before the list is there for all: no later kernel has to wait for those before it to read the list.
            T.ptx["fence.acq_rel.gpu"]()
            T.cuda.cta_sync()
            T.ptx["griddepcontrol.launch_dependents"]()

    return chained(plan, target, shared=True)
