"""The work list of prefill attention, made on the device once a step: the tiles of query rows, costly ones first.

A tile is a run of tokens of one prompt (`phases` 0), and costs as many blocks of keys as its last token reaches back.
Rows of the list are sorted by cost, with a counting sort, so that thread blocks which take them in snake order end at
about the same time: for 16 prompts of 2048 tokens within 1 % of one another, as a simulation of 132 blocks says.

    work[0]      (number of tiles, 0, ...)
    work[1 + i]  (first row, tokens, first entry in page_indices, position of the first token, cached tokens, 0, 0, 0)

Rows past the number of tiles are neither written nor to be read. Tiles of equal cost stand in no fixed order: what a
tile computes does not depend on its place.
"""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import SMEMPool

from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import KernelCall, Output, deferred
from tilewright.schedules.cuda.launch import chained

WORK_ROW = 8  # int32 a row: two vector loads
WORK = "prefill_work"

_THREADS = 1024  # also sequences looked at together, and classes of cost
_WARPS = _THREADS // 32
_EXACT = 512  # costs below it are classes of their own, those above share one with the next 15
_ALL_LANES = 0xFFFFFFFF


def plan_call(
    tokens: int, keys: int, window: int | None, m_max: int, target: Target, every: bool = False
) -> KernelCall:
    """The planner for tiles of `tokens` tokens and blocks of `keys` keys, as a kernel of the paged_attention composite.

    Its output WORK is int32[1 + m_max, WORK_ROW]: m_max tokens make no more tiles than that, whatever sequences they
    belong to. It reads positions, indptr, page_indptr, kv_len and phases, which are the same in every layer. every:
    generated tokens are listed too.
    """
    output = Output(WORK, (1 + m_max, WORK_ROW), "int32")
    kernel = _plan_kernel(tokens, keys, window or 0, m_max, target, every)
    return KernelCall(kernel, (2, 3, 4, 6, 7), (output,), shared=True)


@deferred
def _plan_kernel(tokens: int, keys: int, window: int, m_max: int, target: Target, every: bool) -> Any:
    pdl = target.has("pdl")

    @T.prim_func
    def plan(
        positions_handle: T.handle,
        indptr_handle: T.handle,
        page_indptr_handle: T.handle,
        kv_len_handle: T.handle,
        phases_handle: T.handle,
        work_handle: T.handle,
    ):
        t = T.int32()
        b = T.int32()
        kv_len = T.match_buffer(kv_len_handle, (b,), "int32")
        phases = T.match_buffer(phases_handle, (b,), "int32")
        positions = T.match_buffer(positions_handle, (t,), "int32")
        indptr = T.match_buffer(indptr_handle, (b + 1,), "int32")
        page_indptr = T.match_buffer(page_indptr_handle, (b + 1,), "int32")
        work = T.match_buffer(work_handle, (1 + m_max, WORK_ROW), "int32")
        T.device_entry()
        T.cta_id([1])
        warp = T.warp_id([_WARPS])
        lane = T.lane_id([32])
        thread = T.thread_id([_THREADS])
        pool = SMEMPool()
        # Of the sequences at hand: the number of tiles up to each, rows, tokens, pages, positions, cached tokens.
        ends = pool.alloc((_THREADS,), "int32", align=16)
        rows = pool.alloc((_THREADS,), "int32")
        counts = pool.alloc((_THREADS,), "int32")
        pages = pool.alloc((_THREADS,), "int32")
        firsts = pool.alloc((_THREADS,), "int32")
        lengths = pool.alloc((_THREADS,), "int32")
        classes = pool.alloc((_THREADS,), "int32")  # tiles of each class of cost, then where its next one goes
        warp_sums = pool.alloc((_WARPS,), "int32")
        pool.commit()
        total: T.int32
        other: T.int32
        low: T.int32
        step: T.int32
        offset: T.int32
        count: T.int32
        position: T.int32
        cost: T.int32
        place: T.int32
        tile: T.int32
        sequence: T.int32

        @T.inline
        def scan():
            """total becomes the sum of total of this thread and those before it."""
            for i in T.unroll(5):
                other = T.tvm_warp_shuffle_up(T.uint32(_ALL_LANES), total, 1 << i, 32, 32)
                if lane >= (1 << i):
                    total = total + other
            if lane == 31:
                warp_sums[warp] = total
            T.cuda.cta_sync()
            other = 0
            if lane < warp:
                other = warp_sums[lane]
            total = total + T.cuda.warp_sum(other)
            T.cuda.cta_sync()

        @T.inline
        def take_sequences(base):
            sequence = base + thread
            total = 0
            counts[thread] = 0
            if sequence < b:
                if every or phases[sequence] == 0:
                    low = indptr[sequence]
                    count = indptr[sequence + 1] - low
                    if count > 0:
                        rows[thread] = low
                        counts[thread] = count
                        pages[thread] = page_indptr[sequence]
                        firsts[thread] = positions[low]
                        lengths[thread] = kv_len[sequence]
                        total = T.truncdiv(count + (tokens - 1), tokens)
            scan()
            ends[thread] = total
            T.cuda.cta_sync()

        @T.inline
        def look_at_tile():
            """low becomes the tile's sequence of those at hand; offset, count, position and cost tell of the tile."""
            low = 0
            for i in T.unroll(10):
                step = 512 >> i
                if ends[low + step - 1] <= tile:
                    low = low + step
            # `tile` counts from the end of the sequence: the same tiles in another order.
            offset = (ends[low] - 1 - tile) * tokens
            count = T.min(counts[low] - offset, tokens)
            position = firsts[low] + offset
            cost = T.truncdiv(position + (count - 1), keys)
            if window > 0:
                cost = cost - T.truncdiv(T.max(position - (window - 1), 0), keys)
            if cost >= _EXACT:
                cost = T.min(_EXACT + T.shift_right(cost - _EXACT, 4), _THREADS - 1)

        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
            T.ptx["griddepcontrol.wait"]()
        classes[thread] = 0
        base: T.int32 = 0
        while base < b:
            take_sequences(base)
            tile = thread
            while tile < ends[_THREADS - 1]:
                look_at_tile()
                T.evaluate(T.cuda.atomic_add(classes.ptr_to([cost]), 1))
                tile = tile + _THREADS
            T.cuda.cta_sync()
            base = base + _THREADS
        total = classes[_THREADS - 1 - thread]
        scan()
        if thread == _THREADS - 1:
            work[0, 0] = total
        place = total - classes[_THREADS - 1 - thread]
        classes[_THREADS - 1 - thread] = place
        T.cuda.cta_sync()
        base = 0
        while base < b:
            if b > _THREADS:
                take_sequences(base)
            tile = thread
            while tile < ends[_THREADS - 1]:
                look_at_tile()
                place = T.cuda.atomic_add(classes.ptr_to([cost]), 1) + 1
                T.ptx["st.global.v4.b32"](work.ptr_to([place, 0]), rows[low] + offset, count, pages[low], position)
                T.ptx["st.global.v4.b32"](work.ptr_to([place, 4]), lengths[low], 0, 0, 0)
                tile = tile + _THREADS
            T.cuda.cta_sync()
            base = base + _THREADS

    return chained(plan, target, shared=True)
