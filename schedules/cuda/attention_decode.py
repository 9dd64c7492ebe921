"""Attention of generated tokens over KV pages on Hopper: TMA gathers pages, small products, sums in a fixed tree.

Persistent thread blocks take the parts of the work list by turns. One warp copies pages into a ring of stages of 64
keys; of the four others two work on each stage, a warp on 32 keys (decode_block.py). After every split, of 128 keys,
they merge their results in shared memory, and a thread goes on with some dimensions of all heads (decode_nodes.py). Of
a query's parts the one that ends last merges the results of all. The scheme is Flash-Decoding's (Dao et al. 2023) over
pages, with grouped heads as in FlashInfer (Ye et al. 2025).

A query's bits depend neither on how it is cut, nor on other queries, nor on the size of pages.

Memory past the end of a sequence, or before its window, may hold NaN. Keys there get the score MASKED, and values there
become zeros in registers, since 0 * NaN is NaN.
"""

import math
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import MBarrier, SMEMPool, TMABar

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import deferred
from tilewright.schedules.cuda.decode_block import BLOCK_KEYS, STAGE_KEYS, StageLayout, WarpBlock, exponent
from tilewright.schedules.cuda.decode_nodes import Node, Tree
from tilewright.schedules.cuda.decode_plan import MODES
from tilewright.schedules.cuda.decode_work import (
    END,
    FIRST,
    LEVEL,
    PAGES,
    PART,
    PARTIAL,
    PARTS,
    QUERY,
    SPLIT_KEYS,
    HeadBlocks,
    WorkReader,
    plan_outputs,
    vectors,
)
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.tma import ROW, ROW_BYTES, load_tile, tensor_map

_WARPS = 4  # that compute
_CONSUMERS = 32 * _WARPS
_RESERVED_BYTES = 1 << 10  # of shared memory, by the driver, for each block
_COPY_ROW = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


@dataclass(frozen=True)
class DecodeTile:
    """stages: of 64 keys in shared memory. blocks_per_sm: thread blocks a multiprocessor. mode: how queries are cut,
    one of MODES or "auto". share: of an even share of the work, what a query may be that is not cut."""

    stages: int
    blocks_per_sm: int
    mode: str = "auto"
    share: float = 2.1

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"stages {self.stages} is below 2: two are worked on at a time")
        if self.blocks_per_sm not in (1, 2, 4):
            raise ValueError(f"blocks_per_sm {self.blocks_per_sm} is not 1, 2 or 4")
        if self.mode != "auto" and self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not auto, {', '.join(MODES)}")
        if self.share <= 0:
            raise ValueError(f"share {self.share} is not above 0")

    def shared_bytes(self, spec: PagedAttentionSpec) -> int:
        """Shared memory of a block: stages, their queries and barriers, and what the warps merge."""
        dim, blocks = spec.attention.head_dim, HeadBlocks.of(spec)
        stage = 2 * StageLayout(dim, spec.kv.page_size).side_bytes + blocks.heads * dim * 2 + 16
        return self.stages * stage + _WARPS * (dim + 2) * blocks.padded * 4 + 256

    def fits(self, spec: PagedAttentionSpec, target: Target) -> bool:
        of_sm = target.shared_memory_bytes + _RESERVED_BYTES
        return self.blocks_per_sm * (self.shared_bytes(spec) + _RESERVED_BYTES) <= of_sm


@deferred
def decode_kernel(spec: PagedAttentionSpec, tile: DecodeTile, target: Target, m_max: int, one_each: bool) -> Any:
    """(q[t,H,D], pages[layers,num_pages,2,G,page_size*D], page_indices i32[p], work, partials, counters, layer i64,
    sinks f32[H], out[t,H,D]), with the planner's outputs in the middle. Counters are 0 before and after. A sink is a
    score without a value, in the scale of the softmax; the argument is not read where the spec has none.

    one_each: of every sequence one token, whose key alone is not yet in the pages when the kernel starts."""
    attention, kv, blocks = spec.attention, spec.kv, HeadBlocks.of(spec)
    heads, kv_heads, dim, page_size = attention.heads, kv.kv_heads, attention.head_dim, kv.page_size
    stages, grid = tile.stages, tile.blocks_per_sm * target.sms
    work_shape, partials_shape, counters_shape = (output.shape for output in plan_outputs(spec, m_max))
    pdl = target.has("pdl")

    layout = StageLayout(dim, page_size)
    piece, pieces, chunks = layout.piece, layout.pieces, layout.chunks
    lists = max(1, pieces // 32)  # page entries that a lane holds for a stage
    listed = max(1, 32 // pieces)  # stages that a warp's lanes hold entries for
    early = min(stages, listed) if pdl and one_each else 0  # stages that are copied while kernels before still run

    padded, count = blocks.padded, vectors(spec)
    quads = padded // 4
    dims_a_turn = _CONSUMERS // quads
    sums_at = 512 * count  # in a partial
    batch = max(1, 6 // count)  # partials that are read at a time

    # Which pieces of a stage are copied, by how far they reach past the part's last key.
    def every(past):
        return True

    def newest(past):
        return past >= 0

    def older(past):
        return past < 0

    @T.prim_func
    def attend(
        q_handle: T.handle,
        pages_handle: T.handle,
        page_indices_handle: T.handle,
        work_handle: T.handle,
        partials_handle: T.handle,
        counters_handle: T.handle,
        layer: T.int64,
        sinks_handle: T.handle,
        out_handle: T.handle,
    ):
        t = T.int32()
        num_pages = T.int32()
        entries = T.int32()
        q = T.match_buffer(q_handle, (t, heads, dim), spec.dtype)
        pages = T.match_buffer(pages_handle, (kv.layers, num_pages, 2, kv_heads, page_size * dim), kv.dtype)
        page_indices = T.match_buffer(page_indices_handle, (entries,), "int32")
        work = T.match_buffer(work_handle, work_shape, "int32")
        partials = T.match_buffer(partials_handle, partials_shape, "float32")
        counters = T.match_buffer(counters_handle, counters_shape, "int32")
        if attention.sinks:
            sinks = T.match_buffer(sinks_handle, (heads,), "float32")
        out = T.match_buffer(out_handle, (t, heads, dim), spec.dtype)
        rows_map: T.let[T.handle("tensormap").ty] = T.tvm_stack_alloca("tensormap", 1)
        rows: T.let = num_pages * (kv.layers * 2 * kv_heads * page_size)
        if layout.joined:
            tensor_map(rows_map, pages.data, kv.dtype, (ROW, rows, chunks), (dim * 2, ROW_BYTES), (ROW, piece, chunks))
        else:
            tensor_map(rows_map, pages.data, kv.dtype, (dim, rows), (dim * 2,), (ROW, piece))
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": tile.blocks_per_sm})
        block = T.cta_id([grid])
        warp = T.warp_id([_WARPS + 1])
        lane = T.lane_id([32])
        thread = T.thread_id([_CONSUMERS + 32])
        pool = SMEMPool()
        ring = pool.alloc((stages, 2, layout.side_bytes // 2), kv.dtype, align=1024)
        queries = pool.alloc((stages, blocks.heads * dim), spec.dtype, align=128)
        warp_values = pool.alloc((_WARPS, dim, padded), "float32", align=128)
        warp_sums = pool.alloc((_WARPS, 2, padded), "float32", align=16)  # largest scores, sums of weights
        is_last = pool.alloc((1,), "int32", align=16)
        full = TMABar(pool, stages)
        empty = MBarrier(pool, stages)
        pool.commit()
        todo = WorkReader(work, blocks, block, grid)
        slot = T.alloc_local([1], "int32")
        phase = T.alloc_local([1], "int32")

        @T.inline
        def advance(by):
            slot[0] = slot[0] + by
            if slot[0] >= stages:
                slot[0] = slot[0] - stages
                phase[0] = phase[0] ^ 1

        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
        if thread == _CONSUMERS:
            T.ptx.prefetch.tensormap(T.address_of(rows_map))
        full.init(1)
        empty.init(2)
        T.ptx["fence.mbarrier_init.release.cluster"]()
        T.cuda.cta_sync()
        # The plan's kernel lets no other start before it has written the list, and entries are older than the step.
        todo.start()
        if warp == _WARPS:
            held = T.alloc_local([lists], "int32")  # page entries of the lane's pieces
            ahead = T.alloc_local([lists], "int32")
            first_page: T.let = T.cast(layer, "int32") * num_pages
            slot[0] = 0
            phase[0] = 1
            low = T.alloc_local([1], "int32")
            high = T.alloc_local([1], "int32")
            start = T.alloc_local([1], "int32")
            query_bytes = T.alloc_local([1], "int32")
            stages_of_part = T.alloc_local([1], "int32")
            stage = T.alloc_local([1], "int32")

            @T.inline
            def look_up(part, stage):
                """ahead: the entries of the lane's pieces from a stage on, where they have keys that are read."""
                for i in T.unroll(lists):
                    begin: T.int32 = T.bitwise_and(part[FIRST], -SPLIT_KEYS) + stage * STAGE_KEYS
                    key: T.int32 = begin + (i * 32 + lane) * piece
                    if T.And(key < part[END], key + piece > part[FIRST]):
                        ahead[i] = page_indices[part[PAGES] + T.truncdiv(key, page_size)]

            @T.inline
            def copy_piece(index, entry, key):
                for side in T.unroll(2):
                    head: T.let = ((first_page + entry) * 2 + side) * kv_heads + todo.kv_head
                    row: T.let = head * page_size + T.truncmod(key, page_size)
                    if layout.joined:
                        shared: T.let = ring.ptr_to([slot[0], side, index * (layout.piece_bytes // 2)])
                        load_tile(shared, rows_map, (0, row, 0), full.ptr_to([slot[0]]))
                    else:
                        for c in T.unroll(chunks):
                            at: T.let = (c * STAGE_KEYS + index * piece) * ROW
                            load_tile(
                                ring.ptr_to([slot[0], side, at]), rows_map, (c * ROW, row), full.ptr_to([slot[0]])
                            )

            @T.inline
            def measure(stage):
                """The keys of a stage that are read, and the bytes of the query, which comes with a part's first two
                stages since they go to different warps."""
                low[0] = T.bitwise_and(todo.part[FIRST], -SPLIT_KEYS) + stage * STAGE_KEYS
                high[0] = T.min(low[0] + STAGE_KEYS, todo.part[END])
                start[0] = T.max(low[0], todo.part[FIRST])
                query_bytes[0] = T.Select(stage < 2, todo.heads * (dim * 2), 0)

            @T.inline
            def announce():
                copied: T.int32 = 0
                if start[0] < high[0]:
                    copied = T.truncdiv(high[0] - 1, piece) - T.truncdiv(start[0], piece) + 1
                if lane == 0:
                    full.arrive(slot[0], tx_count=copied * (2 * layout.piece_bytes) + query_bytes[0])
                T.cuda.warp_sync()

            @T.inline
            def copy_keys(stage, wanted):
                for i in T.unroll(lists):
                    index: T.int32 = i * 32 + lane - T.truncmod(stage, listed) * pieces
                    key: T.int32 = low[0] + index * piece
                    if T.And(T.And(index >= 0, index < pieces), T.And(key < high[0], key + piece > start[0])):
                        if wanted(key + piece - todo.part[END]):
                            copy_piece(index, held[i], key)

            @T.inline
            def copy_query():
                if T.And(lane == 0, query_bytes[0] > 0):
                    T.ptx[_COPY_ROW](
                        queries.ptr_to([slot[0], 0]),
                        q.ptr_to([todo.part[QUERY], todo.first_head, 0]),
                        T.cast(query_bytes[0], "uint32"),
                        full.ptr_to([slot[0]]),
                    )

            @T.inline
            def hold():
                for i in T.unroll(lists):
                    held[i] = ahead[i]

            @T.inline
            def count_stages():
                stages_of_part[0] = 0
                if todo.part[END] > 0:
                    first_split: T.int32 = T.truncdiv(todo.part[FIRST], SPLIT_KEYS)
                    stages_of_part[0] = (T.truncdiv(todo.part[END] - 1, SPLIT_KEYS) - first_split + 1) * 2

            @T.inline
            def look_ahead(stage):
                """After the first stage of those that `held` is for."""
                if stage + listed < stages_of_part[0]:
                    look_up(todo.part, stage + listed)
                else:
                    look_up(todo.following, 0)

            look_up(todo.part, 0)
            count_stages()
            if early > 0:
                hold()
                stage[0] = 0
                while stage[0] < T.min(early, stages_of_part[0]):
                    measure(stage[0])
                    announce()
                    copy_keys(stage[0], older)
                    advance(1)
                    stage[0] = stage[0] + 1
                slot[0] = 0
                phase[0] = 1
            if pdl:
                T.ptx["griddepcontrol.wait"]()
            stage[0] = 0
            if early > 0:
                while stage[0] < T.min(early, stages_of_part[0]):
                    measure(stage[0])
                    copy_keys(stage[0], newest)
                    copy_query()
                    advance(1)
                    stage[0] = stage[0] + 1
                if stage[0] > 0:
                    look_ahead(0)
            while todo.part[END] > 0:
                while stage[0] < stages_of_part[0]:
                    if T.truncmod(stage[0], listed) == 0:
                        hold()
                    empty.wait(slot[0], phase[0])
                    measure(stage[0])
                    announce()
                    copy_keys(stage[0], every)
                    copy_query()
                    advance(1)
                    if T.truncmod(stage[0], listed) == 0:
                        look_ahead(stage[0])
                    stage[0] = stage[0] + 1
                todo.take()
                count_stages()
                stage[0] = 0
        else:
            if pdl:
                T.ptx["griddepcontrol.wait"]()
            keys = WarpBlock(attention, kv, warp % 2, lane)
            tree = Tree(count, exponent(attention))
            node = Node(count, exponent(attention))
            quad: T.let = thread % quads  # four heads of the head block
            first_dim: T.let = thread // quads
            sums = T.alloc_local([8 * _WARPS], "float32")
            factor = T.alloc_local([4 * _WARPS], "float32")
            loaded = T.alloc_local([4], "float32")
            read_sums = T.alloc_local([8 * batch], "float32")
            read_values = T.alloc_local([4 * count * batch], "float32")
            arrived = T.alloc_local([1], "int32")
            slot[0] = warp // 2
            phase[0] = 0

            @T.inline
            def wait_for_warps():
                T.ptx["bar.sync"](T.uint32(1), T.uint32(_CONSUMERS))

            @T.inline
            def share():
                """The warp's result into shared memory."""
                if keys.pair < padded:
                    for i in T.unroll(dim // 8):
                        T.ptx["st.shared.v2.f32"](
                            warp_values.ptr_to([warp, i * 8 + keys.row, keys.pair]),
                            keys.product[i * 2],
                            keys.product[i * 2 + 1],
                        )
                    if keys.row == 0:
                        T.ptx["st.shared.v2.f32"](
                            warp_sums.ptr_to([warp, 0, keys.pair]), keys.largest[0], keys.largest[1]
                        )
                        T.ptx["st.shared.v2.f32"](warp_sums.ptr_to([warp, 1, keys.pair]), keys.total[0], keys.total[1])

            @T.inline
            def merge_warps():
                """node: the split."""
                for i in T.unroll(2 * _WARPS):
                    T.ptx["ld.shared.v4.f32"](
                        *[sums[i * 4 + j] for j in range(4)], warp_sums.ptr_to([i // 2, i % 2, quad * 4])
                    )
                for h in T.unroll(4):
                    node.largest[h] = T.max(T.max(sums[h], sums[8 + h]), T.max(sums[16 + h], sums[24 + h]))
                    node.total[h] = T.float32(0)
                    for i in T.unroll(_WARPS):
                        T.ptx["ex2.approx.ftz.f32"](
                            factor[i * 4 + h], (sums[i * 8 + h] - node.largest[h]) * T.float32(node.exponent)
                        )
                        T.ptx["fma.rn.f32"](node.total[h], factor[i * 4 + h], sums[i * 8 + 4 + h], node.total[h])
                for k in T.unroll(count):
                    for h in T.unroll(4):
                        node.values[k * 4 + h] = T.float32(0)
                    for i in T.unroll(_WARPS):
                        T.ptx["ld.shared.v4.f32"](
                            *[loaded[j] for j in range(4)],
                            warp_values.ptr_to([i, T.min(first_dim + k * dims_a_turn, dim - 1), quad * 4]),
                        )
                        for h in T.unroll(4):
                            T.ptx["fma.rn.f32"](
                                node.values[k * 4 + h], factor[i * 4 + h], loaded[h], node.values[k * 4 + h]
                            )

            @T.inline
            def attend_split(split):
                first: T.int32 = split * SPLIT_KEYS + warp * BLOCK_KEYS
                full.wait(slot[0], phase[0])
                keys.attend(
                    T.cuda.cvta_generic_to_shared(ring.ptr_to([slot[0], 0, 0])),
                    todo.part[FIRST] - first,
                    todo.part[END] - first,
                )
                T.cuda.warp_sync()
                if lane == 0:
                    empty.arrive(slot[0])
                advance(2)
                wait_for_warps()  # that still read the split before
                share()
                wait_for_warps()
                merge_warps()

            @T.inline
            def keep_part():
                """The part's result into memory; is_last: those of the query's other parts are there."""
                place: T.let = (todo.part[PARTIAL] + todo.part[PART]) * blocks.units + todo.unit
                counter: T.let = todo.part[PARTIAL] * blocks.units + todo.unit
                for k in T.unroll(count):
                    T.ptx["st.global.v4.f32"](
                        partials.ptr_to([place, (k * _CONSUMERS + thread) * 4]),
                        *[tree.whole.values[k * 4 + j] for j in range(4)],
                    )
                if thread < quads:
                    T.ptx["st.global.v4.f32"](
                        partials.ptr_to([place, sums_at + quad * 4]), *[tree.whole.largest[j] for j in range(4)]
                    )
                    T.ptx["st.global.v4.f32"](
                        partials.ptr_to([place, sums_at + padded + quad * 4]), *[tree.whole.total[j] for j in range(4)]
                    )
                wait_for_warps()
                if thread == 0:
                    T.ptx["atom.acq_rel.gpu.global.add.s32"](arrived[0], counters.ptr_to([counter]), T.int32(1))
                    is_last[0] = T.Select(arrived[0] == todo.part[PARTS] - 1, 1, 0)
                    if arrived[0] == todo.part[PARTS] - 1:
                        counters[counter] = 0
                wait_for_warps()

            @T.inline
            def read_parts(start):
                for j in T.unroll(batch):
                    part: T.let = todo.part[PARTIAL] + T.min(start + j, todo.part[PARTS] - 1)
                    place: T.let = part * blocks.units + todo.unit
                    for k in T.unroll(count):
                        T.ptx["ld.relaxed.gpu.global.v4.f32"](
                            *[read_values[(j * count + k) * 4 + i] for i in range(4)],
                            partials.ptr_to([place, (k * _CONSUMERS + thread) * 4]),
                        )
                    for side in T.unroll(2):
                        T.ptx["ld.relaxed.gpu.global.v4.f32"](
                            *[read_sums[j * 8 + side * 4 + i] for i in range(4)],
                            partials.ptr_to([place, sums_at + side * padded + quad * 4]),
                        )

            @T.inline
            def merge_parts():
                tree.whole.clear()
                first: T.int32 = T.shift_right(todo.part[FIRST], todo.part[LEVEL]) - todo.part[PART]
                start: T.int32 = 0
                while start < todo.part[PARTS]:
                    read_parts(start)
                    for j in T.unroll(batch):
                        if start + j < todo.part[PARTS]:
                            for h in T.unroll(4):
                                node.largest[h] = read_sums[j * 8 + h]
                                node.total[h] = read_sums[j * 8 + 4 + h]
                            for i in T.unroll(4 * count):
                                node.values[i] = read_values[j * count * 4 + i]
                            tree.add(node, todo.part[LEVEL], first + start + j, start + j + 1 == todo.part[PARTS])
                    start = start + batch

            @T.inline
            def add_sinks():
                """To the sums of weights; after all keys, so that parts of a query need not know of them."""
                for h in T.unroll(4):
                    sink: T.float32 = sinks[T.min(todo.first_head + quad * 4 + h, heads - 1)]
                    T.ptx["mul.rn.f32"](sink, sink, T.float32(math.log2(math.e)))
                    T.ptx["fma.rn.f32"](sink, tree.whole.largest[h], T.float32(-node.exponent), sink)
                    T.ptx["ex2.approx.ftz.f32"](sink, sink)
                    tree.whole.total[h] = tree.whole.total[h] + sink

            @T.inline
            def write():
                if attention.sinks:
                    add_sinks()
                for k in T.unroll(count):
                    d: T.let = first_dim + k * dims_a_turn
                    for h in T.unroll(4):
                        if T.And(quad * 4 + h < todo.heads, d < dim):
                            out[todo.part[QUERY], todo.first_head + quad * 4 + h, d] = T.cast(
                                tree.whole.values[k * 4 + h] / tree.whole.total[h], spec.dtype
                            )

            tree.clear()
            while todo.part[END] > 0:
                tree.whole.clear()
                full.wait(slot[0], phase[0])
                keys.load_query(queries, slot[0], todo.heads)
                split: T.int32 = T.truncdiv(todo.part[FIRST], SPLIT_KEYS)
                while split * SPLIT_KEYS < todo.part[END]:
                    attend_split(split)
                    tree.add_split(node, split, (split + 1) * SPLIT_KEYS >= todo.part[END])
                    split = split + 1
                if todo.part[PARTS] > 1:
                    keep_part()
                    if is_last[0] == 1:
                        merge_parts()
                        write()
                else:
                    write()
                todo.take()

    return chained(attend, target, shared=True)
