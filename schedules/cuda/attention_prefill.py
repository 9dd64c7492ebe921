"""Causal attention of prompts over KV pages on Hopper: TMA gathers pages, wgmma multiplies, softmax runs beneath it.

A tile is 64 rows for each of two warpgroups that compute; a row is one query of one head. The heads of a group that
read the same keys stand side by side in it: 32 tokens of 4 heads, say, so that short prompts fill a tile too. One more
warpgroup copies: a warp for queries and keys, one for values, each ahead by as many blocks as there is room for.

A warpgroup walks over the blocks of all its tiles as over one stream. While the tensor cores compute the scores of a
block and then the values of the one before it, its softmax of the new scores runs under the latter; so the end of a
tile overlaps with the start of the next. Blocks go from the diagonal down to key 0. The scheme is FlashAttention-3's
(Shah et al. 2024), over pages and with grouped heads as in FlashInfer (Ye et al. 2025).

Blocks of keys are aligned at position 0 and a block that a row does not see changes nothing of it: its weights are
exactly 0, or are multiplied by exactly 0 when the first key that it sees comes. So a row's bits depend neither on how
the prompt is cut, nor on its place in a tile, nor on other rows.

Memory past the end of a sequence may hold NaN. Keys there get the score MASKED; values there are overwritten by zeros
in shared memory, since 0 * NaN is NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import MBarrier, PipelineState, SMEMPool, TMABar

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import KernelCall, Output, Reject, deferred
from tilewright.schedules.cuda.attention_spec import refuse_attention, sinks_argument
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.prefill_plan import WORK, WORK_ROW, plan_call
from tilewright.schedules.cuda.prefill_rows import CHUNK, Products, Rows

_SWIZZLE_128 = 3  # CUtensorMapSwizzle
_L2_128 = 2  # CUtensorMapL2promotion
_COPY = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
_REGISTERS = {1: (24, 240), 2: (40, 232), 3: (32, 160)}  # of the copying and the computing warpgroups
_OWN_REGISTERS = 32  # of a consumer thread beside scores, weights and values


@dataclass(frozen=True)
class PrefillTile:
    """heads: query heads of one KV head that share a tile. keys: in a block. warpgroups: that compute, 64 rows each.
    stages: blocks of keys, and of values, in shared memory. query_buffers: tiles of queries there."""

    heads: int
    keys: int = 128
    warpgroups: int = 2
    stages: int = 2
    query_buffers: int = 2

    def __post_init__(self) -> None:
        if self.warpgroups not in _REGISTERS:
            raise ValueError(f"warpgroups {self.warpgroups} is not within 1..{len(_REGISTERS)}, what registers allow")
        if not 1 <= self.heads <= self.rows:
            raise ValueError(f"heads {self.heads} is not within 1..{self.rows}, the rows of a tile")
        if self.keys not in (16, 32, 64, 128, 256):
            raise ValueError(f"keys {self.keys} is not a power of two within 16..256, one matrix instruction's columns")
        if self.stages < 1 or self.query_buffers < 1:
            raise ValueError(f"stages {self.stages} and query_buffers {self.query_buffers} must be 1 or more")

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups

    @property
    def tokens(self) -> int:
        return self.rows // self.heads

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory of a block, barriers included."""
        row_bytes = -(-head_dim // CHUNK) * CHUNK * 2
        rows = self.query_buffers * self.rows + 2 * self.stages * self.keys
        return rows * row_bytes + 16 * (self.query_buffers + 2 * self.stages)

    def registers(self, head_dim: int) -> int:
        """Registers of a consumer thread: values and scores in float32, weights in 16 bits."""
        return head_dim // 2 + self.keys // 2 + self.keys // 4 + _OWN_REGISTERS

    def fits(self, head_dim: int, target: Target) -> bool:
        enough = self.registers(head_dim) <= _REGISTERS[self.warpgroups][1]
        return enough and self.shared_bytes(head_dim) <= target.shared_memory_bytes


def refuse_prefill(spec: PagedAttentionSpec, target: Target) -> Reject | None:
    """Why prompts' attention has no kernel here; None where it has."""
    if not (target.has("tma") and target.has("wgmma")):
        return Reject(f"{target.name} has no TMA and no wgmma, which attention of prompts is made of")
    return refuse_attention(spec)


def prefill_space(spec: PagedAttentionSpec, target: Target) -> Sequence[PrefillTile]:
    """Tiles whose buffers fit into the registers and shared memory of the target, the best guess first.

    All have blocks of as many keys, since the bits of a row depend on these and on nothing else of a tile.
    """
    attention = spec.attention
    group = attention.heads // attention.kv_heads
    keys = 128 if attention.head_dim <= 128 else 64
    shapes = [(3, 2, 2), (2, 2, 2), (2, 3, 1), (2, 2, 1), (1, 2, 1)]  # warpgroups, stages, query_buffers
    if attention.soft_cap is not None:
        shapes = shapes[1:]  # the cap wants more registers than three warpgroups leave
    tiles = [PrefillTile(_heads_of_tile(group, 64 * w), keys, w, stages, buffers) for w, stages, buffers in shapes]
    return [tile for tile in tiles if tile.fits(attention.head_dim, target)]


def _heads_of_tile(group: int, rows: int) -> int:
    """As many heads of a group as leave at most an eighth of the rows idle; all parts of a group are equal."""
    return max(h for h in range(1, min(group, rows) + 1) if group % h == 0 and rows % h <= rows // 8)


def prefill_calls(
    spec: PagedAttentionSpec, tile: PrefillTile, target: Target, m_max: int, made: tuple[Output, ...] = ()
) -> tuple[KernelCall, KernelCall]:
    """Planner and kernel, for a lowering of paged_attention that has an output "out", [m, heads, head_dim].

    The kernel writes the rows of sequences whose phase is 0, and leaves all others alone; where the spec is strict, it
    writes those of every sequence. made: that output, where no kernel before has it. Raises ValueError for a tile that
    holds no equal part of a group of heads.
    """
    group = spec.attention.heads // spec.attention.kv_heads
    if group % tile.heads:
        raise ValueError(f"heads {tile.heads} of a tile do not divide the {group} query heads of a KV head")
    plan = plan_call(tile.tokens, tile.keys, spec.attention.window, m_max, target, spec.strict)
    kernel = _prefill_kernel(spec, tile, target, m_max)
    done = Output("prefilled", (1,), "int32")
    inputs = (0, 1, 5, WORK, 8, sinks_argument(spec))
    return plan, KernelCall(kernel, inputs if made else (*inputs, "out"), (*made, done))


@T.meta_class
class _Tiles:
    """The tiles of one thread block, in snake order over the grid. The next one is fetched ahead."""

    def __init__(self, spec: PagedAttentionSpec, tile: PrefillTile, grid: int, work, block_id):
        self.groups, self.keys = spec.attention.heads // tile.heads, tile.keys
        self.window, self.grid, self.work, self.block_id = spec.attention.window or 0, grid, work, block_id
        self.listed = T.local_scalar("int32")
        self.turn = T.local_scalar("int32")
        self.item = T.local_scalar("int32")
        # Of the tile at hand and the next: the planner's row, and which of the groups of heads.
        self.row, self.next_row = T.local_scalar("int32"), T.local_scalar("int32")
        self.tokens, self.next_tokens = T.local_scalar("int32"), T.local_scalar("int32")
        self.entry, self.next_entry = T.local_scalar("int32"), T.local_scalar("int32")
        self.position, self.next_position = T.local_scalar("int32"), T.local_scalar("int32")
        self.cached, self.next_cached = T.local_scalar("int32"), T.local_scalar("int32")
        self.group, self.next_group = T.local_scalar("int32"), T.local_scalar("int32")
        self.block, self.last_block = T.local_scalar("int32"), T.local_scalar("int32")

    @T.inline
    def begin(self):
        self.listed = self.work[0, 0]
        self.turn = 0
        self.fetch()

    @T.inline
    def fetch(self):
        """Where no tile is left, next_tokens is 0."""
        self.item = self.turn * self.grid + self.block_id
        if T.bitwise_and(self.turn, 1) == 1:
            self.item = self.turn * self.grid + (self.grid - 1 - self.block_id)
        self.turn = self.turn + 1
        self.next_group = self.item % self.groups
        self.item = T.truncdiv(self.item, self.groups)
        self.next_tokens = 0
        if self.item < self.listed:
            T.ptx["ld.global.v4.b32"](
                self.next_row, self.next_tokens, self.next_entry, self.next_position,
                self.work.ptr_to([self.item + 1, 0]),
            )  # fmt: skip
            T.ptx["ld.global.b32"](self.next_cached, self.work.ptr_to([self.item + 1, 4]))

    @T.inline
    def take(self):
        """Goes on to the tile that was fetched, at its highest block of keys, and fetches another."""
        self.row = self.next_row
        self.tokens = self.next_tokens
        self.entry = self.next_entry
        self.position = self.next_position
        self.cached = self.next_cached
        self.group = self.next_group
        self.block = T.truncdiv(self.position + (self.tokens - 1), self.keys)
        self.last_block = 0
        if self.window > 0:
            self.last_block = T.truncdiv(T.max(self.position - (self.window - 1), 0), self.keys)
        self.fetch()


@T.meta_class
class _Copier:
    """One warp copies blocks of keys, or of values, from pages into a ring of buffers [stages, chunks, keys, CHUNK].

    A box never crosses a page. Lanes copy a box each, and chunks side by side where boxes are fewer than lanes.
    """

    def __init__(self, spec: PagedAttentionSpec, tile: PrefillTile, tiles: _Tiles, page_map, page_indices, layer, lane):
        kv = spec.kv
        self.page_size, self.kv_heads, self.keys = kv.page_size, kv.kv_heads, tile.keys
        self.groups_per_kv_head = tiles.groups // kv.kv_heads
        self.box = _box(spec, tile)
        self.boxes = tile.keys // self.box
        self.turns = max(1, self.boxes // 32)
        self.chunks = _chunks(spec)
        self.box_bytes = self.box * self.chunks * CHUNK * 2
        self.chunk_lanes = max(1, 32 // self.boxes)
        self.chunk_turns = -(-self.chunks // self.chunk_lanes)
        self.tiles, self.page_map, self.page_indices, self.layer, self.lane = tiles, page_map, page_indices, layer, lane
        self.ring = PipelineState(tile.stages, 1)
        self.valid = T.local_scalar("int32")
        self.row = T.local_scalar("int32")
        self.page = T.alloc_local([self.turns], "int32")

    @T.inline
    def copy_block(self, buffer, full, empty, which):
        """The block of keys (which = 0) or values (1), as far as the sequence goes."""
        self.valid = T.min(
            T.truncdiv(self.tiles.cached - self.tiles.block * self.keys + (self.box - 1), self.box), self.boxes
        )
        for i in T.unroll(self.turns):
            index: T.let = self.lane % self.boxes + i * 32
            if index < self.valid:
                self.page[i] = self.page_indices[
                    self.tiles.entry + T.truncdiv(self.tiles.block * self.keys + index * self.box, self.page_size)
                ]
        empty.wait(self.ring.stage, self.ring.phase)
        if self.lane == 0:
            full.arrive(self.ring.stage, tx_count=self.valid * self.box_bytes)
        T.cuda.warp_sync()
        for i in T.unroll(self.turns):
            index: T.let = self.lane % self.boxes + i * 32
            kv_head: T.let = T.truncdiv(self.tiles.group, self.groups_per_kv_head)
            self.row = ((self.page[i] * 2 + which) * self.kv_heads + kv_head) * self.page_size
            self.row = self.row + (self.tiles.block * self.keys + index * self.box) % self.page_size
            for j in T.unroll(self.chunk_turns):
                chunk: T.let = self.lane // self.boxes + j * self.chunk_lanes
                if index < self.valid and chunk < self.chunks:
                    T.ptx[_COPY](
                        buffer.ptr_to([self.ring.stage, chunk, index * self.box, 0]), T.address_of(self.page_map),
                        chunk * CHUNK, self.row, T.cast(self.layer, "int32"), full.ptr_to([self.ring.stage]),
                    )  # fmt: skip
        self.ring.advance()


def _box(spec: PagedAttentionSpec, tile: PrefillTile) -> int:
    """Rows of a page that are copied at once."""
    return math.gcd(spec.kv.page_size, tile.keys)


def _chunks(spec: PagedAttentionSpec) -> int:
    return -(-spec.attention.head_dim // CHUNK)


@deferred
def _prefill_kernel(spec: PagedAttentionSpec, tile: PrefillTile, target: Target, m_max: int) -> Any:
    kv, dtype, pdl = spec.kv, spec.dtype, target.has("pdl")
    heads, dim, page_elements = spec.attention.heads, spec.attention.head_dim, kv.page_size * kv.head_dim
    rows, keys, stages, warpgroups = tile.rows, tile.keys, tile.stages, tile.warpgroups
    tile_heads, tokens, query_buffers = tile.heads, tile.tokens, tile.query_buffers
    grid = min(target.sms, m_max * (heads // tile.heads))
    copy_registers, compute_registers = _REGISTERS[warpgroups]
    box, chunks = _box(spec, tile), _chunks(spec)
    products = Products(dim, rows, keys, dtype)

    @T.prim_func
    def attend(
        q_handle: T.handle,
        pages_handle: T.handle,
        page_indices_handle: T.handle,
        work_handle: T.handle,
        layer: T.int64,
        sinks_handle: T.handle,
        out_handle: T.handle,
        prefilled_handle: T.handle,
    ):
        t = T.int32()
        num_pages = T.int32()
        p = T.int32()
        q = T.match_buffer(q_handle, (t, heads, dim), dtype)
        pages = T.match_buffer(pages_handle, (kv.layers, num_pages, 2, kv.kv_heads, page_elements), dtype)
        page_indices = T.match_buffer(page_indices_handle, (p,), "int32")
        work = T.match_buffer(work_handle, (1 + m_max, WORK_ROW), "int32")
        if spec.attention.sinks:
            sinks = T.match_buffer(sinks_handle, (heads,), "float32")
        out = T.match_buffer(out_handle, (t, heads, dim), dtype)
        prefilled = T.match_buffer(prefilled_handle, (1,), "int32")
        # Queries as [dim, head, token], pages as [dim, row, layer]. Past the last dimension TMA writes zeros.
        q_map: T.let[T.handle("tensormap").ty] = T.tvm_stack_alloca("tensormap", 1)
        T.tensormap_encode_tiled(
            q_map, q.data, dim, heads, T.cast(t, "int64"), dim * 2, heads * dim * 2, CHUNK, tile_heads, tokens, 1, 1, 1,
            descriptor_dtype=dtype, rank=3, swizzle=_SWIZZLE_128, l2_promotion=_L2_128,
        )  # fmt: skip
        page_rows: T.let = T.cast(num_pages, "int64") * (2 * kv.kv_heads * kv.page_size)
        page_map: T.let[T.handle("tensormap").ty] = T.tvm_stack_alloca("tensormap", 1)
        T.tensormap_encode_tiled(
            page_map, pages.data, dim, page_rows, kv.layers, dim * 2, page_rows * (dim * 2), CHUNK, box, 1, 1, 1, 1,
            descriptor_dtype=dtype, rank=3, swizzle=_SWIZZLE_128, l2_promotion=_L2_128,
        )  # fmt: skip
        T.device_entry()
        block_id = T.cta_id([grid])
        warpgroup = T.warpgroup_id([warpgroups + 1])
        warp = T.warp_id_in_wg([4])
        lane = T.lane_id([32])
        thread = T.thread_id([128 * (warpgroups + 1)])
        pool = SMEMPool()
        q_shared = pool.alloc((query_buffers, chunks, rows, CHUNK), dtype, align=1024)
        k_shared = pool.alloc((stages, chunks, keys, CHUNK), dtype, align=1024)
        v_shared = pool.alloc((stages, chunks, keys, CHUNK), dtype, align=1024)
        q_full = TMABar(pool, query_buffers)
        q_empty = MBarrier(pool, query_buffers)
        k_full = TMABar(pool, stages)
        k_empty = MBarrier(pool, stages)
        v_full = TMABar(pool, stages)
        v_empty = MBarrier(pool, stages)
        pool.commit()
        q_full.init(1)
        k_full.init(1)
        v_full.init(1)
        q_empty.init(4 * warpgroups)
        k_empty.init(4 * warpgroups)
        v_empty.init(4 * warpgroups)
        T.ptx["fence.mbarrier_init.release.cluster"]()
        T.cuda.cta_sync()
        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
            T.ptx["griddepcontrol.wait"]()
        tiles = _Tiles(spec, tile, grid, work, block_id)
        tiles.begin()
        if warpgroup == 0:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](copy_registers)
            copier = _Copier(spec, tile, tiles, page_map, page_indices, layer, lane)
            q_copies = PipelineState(query_buffers, 1)
            if T.And(thread == 0, block_id == 0):
                prefilled[0] = 1
            if warp == 0:
                while tiles.next_tokens > 0:
                    tiles.take()
                    q_empty.wait(q_copies.stage, q_copies.phase)
                    if lane == 0:
                        q_full.arrive(q_copies.stage, tx_count=tokens * tile_heads * chunks * CHUNK * 2)
                    T.cuda.warp_sync()
                    if lane < chunks:
                        T.ptx[_COPY](
                            q_shared.ptr_to([q_copies.stage, lane, 0, 0]), T.address_of(q_map),
                            lane * CHUNK, tiles.group * tile_heads, tiles.row, q_full.ptr_to([q_copies.stage]),
                        )  # fmt: skip
                    q_copies.advance()
                    while tiles.block >= tiles.last_block:
                        copier.copy_block(k_shared, k_full, k_empty, 0)
                        tiles.block = tiles.block - 1
            if warp == 1:
                while tiles.next_tokens > 0:
                    tiles.take()
                    while tiles.block >= tiles.last_block:
                        copier.copy_block(v_shared, v_full, v_empty, 1)
                        tiles.block = tiles.block - 1
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](compute_registers)
            own = Rows(spec, products, tile_heads, (warpgroup - 1) * 64, warp, lane)
            q_ring = PipelineState(query_buffers, 0)
            k_ring = PipelineState(stages, 0)
            v_ring = PipelineState(stages, 0)
            q_address: T.let = T.cuda.cvta_generic_to_shared(q_shared.ptr_to([0, 0, (warpgroup - 1) * 64, 0]))
            k_address: T.let = T.cuda.cvta_generic_to_shared(k_shared.ptr_to([0, 0, 0, 0]))
            v_address: T.let = T.cuda.cvta_generic_to_shared(v_shared.ptr_to([0, 0, 0, 0]))
            q_base: T.uint64 = T.cast(q_address >> T.uint32(4), "uint64") | T.uint64(products.row_descriptor)
            k_base: T.uint64 = T.cast(k_address >> T.uint32(4), "uint64") | T.uint64(products.row_descriptor)
            v_base: T.uint64 = T.cast(v_address >> T.uint32(4), "uint64") | T.uint64(products.value_descriptor)
            q_now: T.uint64
            k_now: T.uint64
            v_now: T.uint64
            old_row: T.int32
            old_tokens: T.int32
            old_group: T.int32
            accumulate: T.int32
            fresh: T.int32
            piece: T.int32

            @T.inline
            def begin_tile():
                own.begin()
                if spec.attention.sinks:
                    own.add_sinks(sinks, tiles.group * tile_heads)

            @T.inline
            def begin_scores():
                """Of the tile's queries and the block of keys at hand."""
                k_full.wait(k_ring.stage, k_ring.phase)
                q_now = q_base + T.cast(q_ring.stage, "uint64") * T.uint64(products.query_stride)
                k_now = k_base + T.cast(k_ring.stage, "uint64") * T.uint64(products.key_stride)
                T.ptx["wgmma.fence.sync.aligned"]()
                own.multiply_keys(q_now, k_now)

            @T.inline
            def begin_values():
                v_full.wait(v_ring.stage, v_ring.phase)
                v_now = v_base + T.cast(v_ring.stage, "uint64") * T.uint64(products.key_stride)
                own.multiply_values(v_now, accumulate)

            @T.inline
            def release(empty, ring):
                if lane == 0:
                    empty.arrive(ring.stage)
                ring.advance()

            @T.inline
            def clear_tail():
                """Zeros over the values past the sequence's end, where the block at hand reaches beyond it."""
                if tiles.cached < tiles.block * keys + keys:
                    v_full.wait(v_ring.stage, v_ring.phase)
                    for chunk in T.unroll(chunks):
                        piece = (tiles.cached - tiles.block * keys) * 8 + thread % 128
                        while piece < keys * 8:
                            T.ptx["st.shared.v4.b32"](
                                v_shared.ptr_to([v_ring.stage, chunk, T.truncdiv(piece, 8), piece % 8 * 8]),
                                T.uint32(0), T.uint32(0), T.uint32(0), T.uint32(0),
                            )  # fmt: skip
                            piece = piece + 128
                    T.ptx["fence.proxy.async.shared::cta"]()
                    T.ptx["bar.sync"](T.cast(warpgroup, "uint32"), T.uint32(128))

            if tiles.next_tokens > 0:
                tiles.take()
                accumulate = 0
                q_full.wait(q_ring.stage, q_ring.phase)
                begin_scores()
                T.ptx["wgmma.wait_group.sync.aligned"](0)
                release(k_empty, k_ring)
                begin_tile()
                own.softmax(tiles.position - tiles.block * keys)
                own.round_weights()
                while T.Or(tiles.block > tiles.last_block, tiles.next_tokens > 0):
                    clear_tail()
                    fresh = 0
                    if tiles.block > tiles.last_block:
                        tiles.block = tiles.block - 1
                    else:
                        old_row = tiles.row
                        old_tokens = tiles.tokens
                        old_group = tiles.group
                        fresh = 1
                        tiles.take()
                        release(q_empty, q_ring)
                        q_full.wait(q_ring.stage, q_ring.phase)
                    begin_scores()
                    begin_values()
                    T.ptx["wgmma.wait_group.sync.aligned"](1)
                    release(k_empty, k_ring)
                    own.old_total[0] = own.total[0]
                    own.old_total[1] = own.total[1]
                    if fresh == 1:
                        begin_tile()
                    own.softmax(tiles.position - tiles.block * keys)
                    # The wait stands in both branches: before them it would move up, to where the softmax begins.
                    if fresh == 1:
                        T.ptx["wgmma.wait_group.sync.aligned"](0)
                        own.store(out, old_row, old_tokens, old_group * tile_heads, own.old_total)
                        accumulate = 0
                    else:
                        T.ptx["wgmma.wait_group.sync.aligned"](0)
                        own.rescale_values()
                        accumulate = 1
                    release(v_empty, v_ring)
                    own.round_weights()
                clear_tail()
                T.ptx["wgmma.fence.sync.aligned"]()
                begin_values()
                T.ptx["wgmma.wait_group.sync.aligned"](0)
                own.store(out, tiles.row, tiles.tokens, tiles.group * tile_heads, own.total)

    return chained(attend, target, shared=True)
