"""Kernels that do nothing but move memory: what a GPU's memory delivers is measured with them."""

from typing import Any

from tvm.script import tirx as T

THREADS = 256
BLOCKS_PER_SM = 4
UNROLL = 8  # vectors that a thread has under way
VECTOR_BYTES = 16


def turn_bytes(blocks: int) -> int:
    """What all threads move in one turn; buffers are a multiple of it."""
    return blocks * THREADS * UNROLL * VECTOR_BYTES


def read_kernel(blocks: int, size: int) -> Any:
    """(x u32[size / 4], sums u32[blocks * 256]): every thread adds up its part of x, and so reads it."""
    turns = size // turn_bytes(blocks)

    @T.prim_func
    def kernel(x_ptr: T.handle, sums_ptr: T.handle):
        T.func_attr({"global_symbol": "read"})
        x = T.match_buffer(x_ptr, (size // 4,), "uint32")
        sums = T.match_buffer(sums_ptr, (blocks * THREADS,), "uint32")
        T.device_entry()
        block = T.cta_id([blocks])
        thread = T.thread_id([THREADS])
        first: T.let = block * THREADS + thread
        values = T.alloc_local([4 * UNROLL], "uint32")
        total = T.alloc_local([1], "uint32")
        total[0] = T.uint32(0)
        for turn in T.serial(turns):
            for i in T.unroll(UNROLL):
                T.ptx["ld.global.v4.b32"](
                    values[4 * i],
                    values[4 * i + 1],
                    values[4 * i + 2],
                    values[4 * i + 3],
                    x.ptr_to([((turn * UNROLL + i) * (blocks * THREADS) + first) * 4]),
                )
            for i in T.unroll(4 * UNROLL):
                total[0] = total[0] + values[i]
        sums[first] = total[0]

    return kernel


def copy_kernel(blocks: int, size: int) -> Any:
    """(x u32[size / 4], y u32[size / 4]): y = x."""
    turns = size // turn_bytes(blocks)

    @T.prim_func
    def kernel(x_ptr: T.handle, y_ptr: T.handle):
        T.func_attr({"global_symbol": "copy"})
        x = T.match_buffer(x_ptr, (size // 4,), "uint32")
        y = T.match_buffer(y_ptr, (size // 4,), "uint32")
        T.device_entry()
        block = T.cta_id([blocks])
        thread = T.thread_id([THREADS])
        first: T.let = block * THREADS + thread
        values = T.alloc_local([4 * UNROLL], "uint32")
        for turn in T.serial(turns):
            for i in T.unroll(UNROLL):
                T.ptx["ld.global.v4.b32"](
                    values[4 * i],
                    values[4 * i + 1],
                    values[4 * i + 2],
                    values[4 * i + 3],
                    x.ptr_to([((turn * UNROLL + i) * (blocks * THREADS) + first) * 4]),
                )
            for i in T.unroll(UNROLL):
                T.ptx["st.global.v4.b32"](
                    y.ptr_to([((turn * UNROLL + i) * (blocks * THREADS) + first) * 4]),
                    values[4 * i],
                    values[4 * i + 1],
                    values[4 * i + 2],
                    values[4 * i + 3],
                )

    return kernel
