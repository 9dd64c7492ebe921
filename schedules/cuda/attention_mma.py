"""Causal attention over KV pages on GPUs without TMA and wgmma: prompts and generated tokens by one kernel, mma.sync.

A sequence's rows are its new tokens' query heads of one KV head, head by head within a token. A block takes up to ROWS
of them, whichever tokens they belong to, a warp 16; so a group of any size fills the matrix units as far as it can. All
threads copy blocks of keys and values from the pages by cp.async while the block before is computed, as
FlashAttention-2 does (Dao 2023). Page entries are read one block further ahead.

Blocks of keys are aligned at position 0 and go from there up; one that a row does not see changes nothing of it: its
weights are exactly 0, or are multiplied by exactly 0 when the first key that it sees comes. So a row's bits depend on
its query and its keys alone. Slots that no row of the block may see are not read; zeros stand in their place, since
0 * NaN is NaN.
"""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import SMEMPool

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import deferred
from tilewright.schedules.cuda.attention_mma_rows import PAD, WARP_ROWS, WARPS, MmaRows, SharedRows
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.rows import power_of_two

THREADS = 32 * WARPS
ROWS = WARP_ROWS * WARPS  # of a block

_ALL_LANES = 0xFFFFFFFF
_COPY_VALUES, _COPY_BYTES = 8, 16
_RESERVED_BYTES = 1024  # of shared memory, by each block


@dataclass(frozen=True)
class AttentionMmaTile:
    """keys: in a block; a row's bits depend on it. blocks_per_sm: that fit side by side."""

    keys: int
    blocks_per_sm: int = 1

    def __post_init__(self) -> None:
        if self.keys not in (32, 64, 128):
            raise ValueError(f"keys {self.keys} is none of 32, 64, 128")
        if self.blocks_per_sm not in (1, 2):
            raise ValueError(f"blocks_per_sm {self.blocks_per_sm} is not 1 or 2, what registers allow")

    def shared_bytes(self, head_dim: int) -> int:
        """Two buffers of keys, and of values, and a block's scores."""
        return 4 * self.keys * (head_dim + PAD) * 2 + self.keys * WARP_ROWS * 4

    def fits(self, head_dim: int, target: Target) -> bool:
        room = target.shared_memory_bytes + _RESERVED_BYTES
        return self.blocks_per_sm * (self.shared_bytes(head_dim) + _RESERVED_BYTES) <= room


@deferred
def attention_mma_kernel(spec: PagedAttentionSpec, tile: AttentionMmaTile, target: Target, decode: bool) -> Any:
    """(q[t,H,D], pages[layers,num_pages,2,G,page_size*D], positions, indptr, page_indptr, page_indices, kv_len, layer
    i64, sinks f32[H], out[t,H,D]). The sinks are not read where the spec has none.

    decode: every sequence has one token; those that pad the step have no keys, and nothing is written for them. The
    positions of a sequence's tokens follow one another.
    """
    attention, kv, keys = spec.attention, spec.kv, tile.keys
    heads, kv_heads, dim, page_size = attention.heads, kv.kv_heads, attention.head_dim, kv.page_size
    group, window = heads // kv_heads, attention.window or 0
    pieces = dim // _COPY_VALUES  # of a row
    lanes = power_of_two(pieces)  # that copy a row
    apart = THREADS // lanes  # rows that the block copies at once
    turns = keys // apart
    tiles_of_one = -(-group // ROWS)  # of a sequence of one token
    shared = decode and group <= WARP_ROWS
    pdl = target.has("pdl")

    def tiles(b, t):
        """As many as there may be: where each sequence leaves a tile with one row in it."""
        return b * tiles_of_one if decode else (t * group + b * (ROWS - 1)) // ROWS

    def rows_of_warp(first_row, warp, lane, exchange):
        if shared:
            return SharedRows(spec, keys, first_row, lane, warp, exchange)
        return MmaRows(spec, keys, first_row + warp * WARP_ROWS, lane)

    @T.prim_func
    def attend(
        q_handle: T.handle,
        pages_handle: T.handle,
        positions_handle: T.handle,
        indptr_handle: T.handle,
        page_indptr_handle: T.handle,
        page_indices_handle: T.handle,
        kv_len_handle: T.handle,
        layer: T.int64,
        sinks_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr({"global_symbol": "attention_mma"})
        t = T.int32()
        b = T.int32()
        entries = T.int32()
        num_pages = T.int32()
        q = T.match_buffer(q_handle, (t, heads, dim), spec.dtype)
        pages = T.match_buffer(pages_handle, (kv.layers, num_pages, 2, kv_heads, page_size * dim), kv.dtype)
        positions = T.match_buffer(positions_handle, (t,), "int32")
        kv_len = T.match_buffer(kv_len_handle, (b,), "int32")
        indptr = T.match_buffer(indptr_handle, (b + 1,), "int32")
        page_indptr = T.match_buffer(page_indptr_handle, (b + 1,), "int32")
        page_indices = T.match_buffer(page_indices_handle, (entries,), "int32")
        if attention.sinks:
            sinks = T.match_buffer(sinks_handle, (heads,), "float32")
        out = T.match_buffer(out_handle, (t, heads, dim), spec.dtype)
        T.device_entry()
        block = T.cta_id([tiles(b, t) * kv_heads])
        thread = T.thread_id([THREADS])
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": tile.blocks_per_sm})
        pool = SMEMPool()
        ring = pool.alloc((2, 2, keys, dim + PAD), kv.dtype, align=128)  # keys, and values behind them
        exchange = pool.alloc((keys // 8, 32, 4), "float32", align=128)
        pool.commit()
        lane: T.let = thread % 32
        kv_head: T.let = block % kv_heads
        page = T.alloc_local([keys // 32], "int32")  # each lane's of every 32 keys
        sequence: T.int32 = -1
        first_row: T.int32 = 0
        first_token: T.int32 = 0
        tokens: T.int32 = 1

        @T.inline
        def find_tile():
            """sequence, first_row of the block's tile, -1 where there is none: the last come first, which are the
            longest of a prompt. Each warp counts the tiles of 32 sequences at a time."""
            left: T.int32 = tiles(b, t) - 1 - T.truncdiv(block, kv_heads)
            start: T.int32 = 0
            count: T.int32 = 0
            upto: T.int32 = 0
            other: T.int32 = 0
            while T.And(sequence < 0, start < b):
                count = 0
                if start + lane < b:
                    count = T.truncdiv((indptr[start + lane + 1] - indptr[start + lane]) * group + (ROWS - 1), ROWS)
                upto = count
                for i in T.unroll(5):
                    other = T.tvm_warp_shuffle_up(T.uint32(_ALL_LANES), upto, 1 << i, 32, 32)
                    if lane >= (1 << i):
                        upto = upto + other
                # At most one lane has the tile.
                count = T.Select(T.And(left < upto, left >= upto - count), left - (upto - count), -1)
                sequence = T.cuda.warp_sum(T.Select(count >= 0, start + lane + 1, 0)) - 1
                first_row = T.cuda.warp_sum(T.max(count, 0)) * ROWS
                left = left - T.tvm_warp_shuffle(T.uint32(_ALL_LANES), upto, 31, 32, 32)
                start = start + 32

        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
            T.ptx["griddepcontrol.wait"]()
        if decode:
            sequence = T.truncdiv(block, kv_heads * tiles_of_one)
            first_row = T.truncmod(T.truncdiv(block, kv_heads), tiles_of_one) * ROWS
            first_token = sequence
        else:
            find_tile()
            if sequence >= 0:
                first_token = indptr[sequence]
                tokens = indptr[sequence + 1] - first_token
        position: T.int32 = 0
        end: T.int32 = 0  # of the keys that a row of the tile sees
        if sequence >= 0:
            position = positions[first_token]
            end = position + T.truncdiv(T.min(first_row + ROWS, tokens * group) - 1, group) + 1
            end = T.min(end, kv_len[sequence])
        if end > 0:
            begin: T.int32 = 0
            if window > 0:
                begin = T.max(position + T.truncdiv(first_row, group) - (window - 1), 0)
            entry: T.int32 = page_indptr[sequence]
            piece: T.int32 = thread % lanes
            copied: T.int32 = thread // lanes

            @T.inline
            def look_up(block_of_keys):
                """page: of the block's keys, as far as they are read."""
                for i in T.unroll(keys // 32):
                    key: T.let = block_of_keys * keys + i * 32 + lane
                    page[i] = 0
                    if T.And(key >= begin, key < end):
                        page[i] = page_indices[entry + T.truncdiv(key, page_size)]

            @T.inline
            def copy_block(block_of_keys, side):
                for i in T.unroll(turns):
                    row: T.let = copied + i * apart
                    key: T.let = block_of_keys * keys + row
                    of_row: T.int32 = T.tvm_warp_shuffle(
                        T.uint32(_ALL_LANES), page[i * apart // 32], T.bitwise_and(row, 31), 32, 32
                    )
                    if piece < pieces:
                        for which in T.unroll(2):
                            slot: T.let = T.truncmod(key, page_size) * dim + piece * _COPY_VALUES
                            T.ptx["cp.async.cg.shared.global"](
                                ring.ptr_to([which, side, row, piece * _COPY_VALUES]),
                                pages.ptr_to([layer, T.cast(of_row, "int64"), which, kv_head, slot]),
                                _COPY_BYTES,
                                T.Select(T.And(key >= begin, key < end), T.uint32(_COPY_BYTES), T.uint32(0)),
                            )
                T.ptx["cp.async.commit_group"]()

            own = rows_of_warp(first_row, thread // 32, lane, exchange)
            k_start: T.uint32 = T.cuda.cvta_generic_to_shared(ring.ptr_to([0, 0, 0, 0]))
            v_start: T.uint32 = T.cuda.cvta_generic_to_shared(ring.ptr_to([1, 0, 0, 0]))
            block_of_keys: T.int32 = T.truncdiv(begin, keys)
            side: T.int32 = 0
            look_up(block_of_keys)
            copy_block(block_of_keys, 0)
            look_up(block_of_keys + 1)
            own.load_queries(q, first_token, tokens, kv_head * group)
            own.begin()
            if attention.sinks:
                own.add_sinks(sinks, kv_head * group)
            own.begin_values()
            while block_of_keys * keys < end:
                T.ptx["cp.async.wait_group"](0)
                T.cuda.cta_sync()  # the block is there for all, and all have done with the one before
                if (block_of_keys + 1) * keys < end:
                    copy_block(block_of_keys + 1, 1 - side)
                    look_up(block_of_keys + 2)
                if own.first_row < tokens * group:
                    own.multiply_keys(k_start + T.cast(side * (keys * own.pitch), "uint32"))
                    own.softmax(position - block_of_keys * keys)
                    own.rescale_values()
                    own.round_weights()
                    own.multiply_values(v_start + T.cast(side * (keys * own.pitch), "uint32"))
                block_of_keys = block_of_keys + 1
                side = 1 - side
            own.store(out, first_token, tokens, kv_head * group, own.total)

    return chained(attend, target, shared=True)
