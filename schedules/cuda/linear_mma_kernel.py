"""The kernel of dense linears on GPUs without wgmma: y[M, N] = x[M, K] @ W[N, K]^T by mma.sync, fed by cp.async.

A block computes a tile of `tokens` tokens by `rows` outputs. All its threads copy stages of K into a ring in shared
memory, some steps ahead, and each warp multiplies its part of the tile: tokens are the 16 rows of mma.m16n8k16, outputs
its 8 columns.

A sum over K is one chain of steps of 16 in increasing K, whatever the tile: the same bits for any tokens beside. What
lies past M or N is not loaded, since it only reaches sums that are not stored; what lies past K is zero on both sides.

With a gate, rows are loaded in groups of 8, a group of gate and a group of up by turns, so that a thread holds both
halves of what it activates.
"""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import SMEMPool

from tilewright.compiler.composites import LinearSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import deferred
from tilewright.schedules.cuda.activations import gate_product
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.linear_arguments import match_arguments
from tilewright.schedules.cuda.linear_mma_tile import CHUNK, LinearMmaTile
from tilewright.schedules.cuda.pairs import PTX_TYPES
from tilewright.schedules.cuda.rows import Vector

_LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"


@deferred
def linear_mma_kernel(spec: LinearSpec, tile: LinearMmaTile, target: Target) -> Any:
    """Of the arguments in linear_arguments.py."""
    n, k = spec.out_features, spec.in_features
    gated, outs = spec.gate is not None, spec.result_features
    rows, tokens, depth, stages, threads = tile.rows, tile.tokens, tile.depth, tile.stages, tile.threads
    row_blocks, steps, group = -(-n // rows), -(-k // depth), tile.group
    copied = next(width for width in (8, 4, 2) if k % width == 0)  # values of a copy
    copy = f"cp.async.{'cg' if copied == 8 else 'ca'}.shared.global"
    pieces = depth // copied  # of a row in a stage
    apart = threads // pieces  # rows that the block copies at once
    warp_tokens, warp_rows = tokens // tile.token_warps, rows // tile.row_warps
    bands, columns = warp_tokens // 16, warp_rows // 8
    period, mixed = tile.swizzle
    kind = PTX_TYPES[spec.dtype]
    multiply = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    paired = 2 if outs % 2 == 0 else 1  # outputs side by side that one instruction stores
    stored, added = Vector(spec.out_dtype, paired), Vector(spec.dtype, paired)
    pdl = target.has("pdl")

    def weight_row(first, r):
        """Of the tile's row r, in the weight."""
        if not gated:
            return first + r
        eighth = T.shift_right(r, 3)
        return T.bitwise_and(eighth, 1) * outs + T.shift_right(first, 1) + T.shift_right(r, 4) * 8 + T.bitwise_and(r, 7)

    def swizzled(chunk, r):
        """Where a chunk of row r lies in the row."""
        return T.bitwise_xor(chunk, T.bitwise_and(T.truncdiv(r, period), mixed - 1))

    def place(piece, r):
        """Of a piece of row r in a stage."""
        chunk = swizzled(T.truncdiv(piece, CHUNK), r) * CHUNK
        return chunk if copied == CHUNK else chunk + T.truncmod(piece, CHUNK)

    def filled(column):
        """Bytes that are read, where not all are: the others of a copy are zeros."""
        return [T.Select(column < k, T.uint32(copied * 2), T.uint32(0))] if k % depth else []

    def compute(values, acc, constant, at):
        """Two outputs before the residual is added, of the sums from acc[at] on."""
        for c in range(2):
            if spec.gate is None:
                T.buffer_store(values, acc[at + c] + constant[c], [c])
            else:
                gate, up = acc[at + c] + constant[c], acc[at + 4 + c] + constant[2 + c]
                T.buffer_store(values, gate_product(spec.gate.activation, gate, up), [c])

    def add(values, part, loaded):
        """The outputs from `part` on, plus what was loaded beside them."""
        for c, value in enumerate(added.values(loaded)):
            T.buffer_store(values, values[part + c] + value, [part + c])

    @T.prim_func
    def kernel(x_ptr: T.handle, w_ptr: T.handle, b_ptr: T.handle, r_ptr: T.handle, y_ptr: T.handle):
        T.func_attr({"global_symbol": "linear_mma"})
        m = T.int32()
        x, w, bias, residual, y = match_arguments(spec, m, x_ptr, w_ptr, b_ptr, r_ptr, y_ptr)
        T.device_entry()
        block = T.cta_id([row_blocks * ((m + (tokens - 1)) // tokens)])
        thread = T.thread_id([threads])
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": tile.blocks_per_sm})
        pool = SMEMPool()
        x_ring = pool.alloc((stages, tokens, depth), spec.dtype, align=128)
        w_ring = pool.alloc((stages, rows, depth), spec.dtype, align=128)
        pool.commit()
        lane: T.let = thread % 32
        acc = T.alloc_local([bands * columns * 4], "float32")
        a = T.alloc_local([bands * 4], "uint32")
        b = T.alloc_local([columns * 2], "uint32")
        before = added.registers()
        rounded = stored.registers()
        values = T.alloc_local([2], "float32")
        constant = T.alloc_local([4], "float32")

        # Up to `group` blocks of tokens follow one another on the same weights, which the cache then holds.
        token_block: T.int32 = T.truncdiv(block, group * row_blocks) * group
        deep: T.int32 = T.min((m + (tokens - 1)) // tokens - token_block, group)
        row0: T.int32 = T.truncdiv(block - token_block * row_blocks, deep)
        token0: T.int32 = (block - token_block * row_blocks - row0 * deep + token_block) * tokens
        row0 = row0 * rows

        copied_row: T.int32 = thread // pieces
        piece: T.int32 = thread % pieces * copied

        @T.inline
        def load_tokens(stage, step):
            column: T.let = step * depth + piece
            for i in T.unroll(-(-tokens // apart)):
                r: T.let = copied_row + i * apart
                if T.And(token0 + r < m, r < tokens):
                    T.ptx[copy](
                        x_ring.ptr_to([stage, r, place(piece, r)]),
                        x.ptr_to([T.cast(token0 + r, "int64"), column]),
                        copied * 2,
                        *filled(column),
                    )

        @T.inline
        def load_weights(stage, step):
            column: T.let = step * depth + piece
            for i in T.unroll(-(-rows // apart)):
                r: T.let = copied_row + i * apart
                row: T.let = weight_row(row0, r)
                if T.And(row < n, r < rows):
                    T.ptx[copy](
                        w_ring.ptr_to([stage, r, place(piece, r)]),
                        w.ptr_to([T.cast(row, "int64"), column]),
                        copied * 2,
                        *filled(column),
                    )

        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
            for s in T.unroll(min(stages - 1, steps)):
                load_weights(s, s)
            T.ptx["griddepcontrol.wait"]()
        for s in T.unroll(stages - 1):
            if s < steps:
                if not pdl:
                    load_weights(s, s)
                load_tokens(s, s)
            T.ptx["cp.async.commit_group"]()

        warp: T.let = thread // 32
        warp_token: T.int32 = warp % tile.token_warps * warp_tokens
        warp_row: T.int32 = warp // tile.token_warps * warp_rows
        # Which row and which of two chunks the lane gives the address of, in the matrices of 16 rows by 16 values.
        x_lane: T.int32 = lane % 16
        w_lane: T.int32 = lane % 8 + lane // 16 * 8
        x_start: T.uint32 = T.cuda.cvta_generic_to_shared(x_ring.ptr_to([0, warp_token + x_lane, 0]))
        w_start: T.uint32 = T.cuda.cvta_generic_to_shared(w_ring.ptr_to([0, warp_row + w_lane, 0]))
        x_chunk: T.int32 = swizzled(lane // 16, x_lane) * (2 * CHUNK)
        w_chunk: T.int32 = swizzled(lane // 8 % 2, w_lane) * (2 * CHUNK)

        @T.inline
        def multiply_stage(stage):
            for i in T.unroll(depth // 16):
                for band in T.unroll(bands):
                    T.ptx[_LOAD](
                        *[a[band * 4 + j] for j in range(4)],
                        x_start
                        + T.cast(
                            (stage * tokens + band * 16) * (depth * 2) + T.bitwise_xor(x_chunk, i * 4 * CHUNK), "uint32"
                        ),
                    )
                for pair in T.unroll(columns // 2):
                    T.ptx[_LOAD](
                        *[b[pair * 4 + j] for j in range(4)],
                        w_start
                        + T.cast(
                            (stage * rows + pair * 16) * (depth * 2) + T.bitwise_xor(w_chunk, i * 4 * CHUNK), "uint32"
                        ),
                    )
                for band in T.unroll(bands):
                    for column in T.unroll(columns):
                        first: T.let = (band * columns + column) * 4
                        T.ptx[multiply](
                            *[acc[first + j] for j in range(4)],
                            *[a[band * 4 + j] for j in range(4)],
                            b[column * 2],
                            b[column * 2 + 1],
                            *[acc[first + j] for j in range(4)],
                        )

        for i in T.unroll(bands * columns * 4):
            acc[i] = T.float32(0)
        stage: T.int32 = 0
        for step in T.serial(steps):
            T.ptx["cp.async.wait_group"](stages - 2)
            T.cuda.cta_sync()  # the stage is there for all, and all have done with the one before
            if step + (stages - 1) < steps:
                load_weights(T.Select(stage == 0, stages - 1, stage - 1), step + (stages - 1))
                load_tokens(T.Select(stage == 0, stages - 1, stage - 1), step + (stages - 1))
            T.ptx["cp.async.commit_group"]()
            multiply_stage(stage)
            stage = T.Select(stage == stages - 1, 0, stage + 1)

        for column in T.unroll(columns // 2 if gated else columns):
            out: T.let = (T.shift_right(row0 + warp_row, 1) if gated else row0 + warp_row) + column * 8 + lane % 4 * 2
            for i in T.unroll(4):
                constant[i] = T.float32(0)
            if spec.bias:
                for i in T.unroll(4 if gated else 2):
                    constant[i] = bias[i // 2 * outs + T.min(out + i % 2, outs - 1)]
            for band in T.unroll(bands):
                for r in T.unroll(2):
                    token: T.let = token0 + warp_token + band * 16 + r * 8 + lane // 4
                    compute(values, acc, constant, (band * columns + column * (2 if gated else 1)) * 4 + r * 2)
                    for part in T.unroll(2 // paired):
                        if T.And(token < m, out + part < outs):
                            if spec.residual:
                                added.load(before, residual.ptr_to([T.cast(token, "int64"), out + part]))
                                add(values, part, before)
                            stored.round(rounded, [values[part + c] for c in range(paired)])
                            stored.store(y.ptr_to([T.cast(token, "int64"), out + part]), rounded)

    return chained(kernel, target, shared=True)
