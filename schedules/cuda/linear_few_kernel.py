"""The kernel of dense linears for few tokens and small weights on Hopper: y[M, N] = x[M, K] @ W[N, K]^T by mma.sync.

Where a weight is small, a step is launches and latencies. So nothing passes through shared memory but sums: a block has
16 outputs, its warps a part of K each, and a thread loads what it multiplies from memory into registers, weights while
the kernel before still runs. Weights are the 16 rows of mma.m16n8k16, tokens its 8 columns.

A part of a sum over K (`parts_of`) is one chain of steps of 16 in increasing K, which the warps hand on from one to the
next, and the last warp adds the parts up in order. So a sum has the bits of `linear_kernel`: on Hopper a step adds its
16 products to the sum at once, in mma.sync as in wgmma, whatever their order in it. Each thread takes four neighbouring
values of a step, as one load.

With a gate, a block's rows are 8 of the gate and the 8 of up beside them.

With a norm, the block normalises its tokens by itself: each of its warps adds up the squares of some tokens, as
`norm_kernel` does with one warp a row, and what is multiplied is rounded as that kernel rounds it: the same bits.
"""

from dataclasses import replace
from typing import Any

from tvm.script import tirx as T

from tilewright.compiler.composites import LinearSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import deferred
from tilewright.schedules.cuda.activations import gate_product
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.linear_arguments import match_arguments
from tilewright.schedules.cuda.linear_few_tile import STEP, TOKENS, LinearFewTile
from tilewright.schedules.cuda.linear_parts import parts_of
from tilewright.schedules.cuda.pairs import PTX_TYPES, pack_pair, unpack_pair
from tilewright.schedules.cuda.rms_norm import threads_of
from tilewright.schedules.cuda.rows import Vector, add_squares, load_floats

_ROWS = 16  # of a block


@deferred
def linear_few_kernel(spec: LinearSpec, tile: LinearFewTile, target: Target) -> Any:
    """Of the arguments in linear_arguments.py."""
    n, k = spec.out_features, spec.in_features
    gated, outs = spec.gate is not None, spec.result_features
    warps, parts = tile.warps, parts_of(spec)
    chain = warps // parts  # of warps, for a part
    steps = k // STEP // warps  # of a warp
    row_blocks = -(-n // _ROWS)
    kind = PTX_TYPES[spec.dtype]
    multiply = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    stored, added = Vector(spec.out_dtype, 1), Vector(spec.dtype, 1)
    halves = 1 if gated else 2  # outputs of a thread for a token, 8 apart
    ragged = n % _ROWS != 0
    pdl = target.has("pdl")
    normed = spec.norm is not None
    norm = replace(spec.norm, dtype=spec.dtype) if spec.norm else None
    eps = norm.eps if norm else 0.0
    (vector,) = Vector.widest([spec.dtype], k)
    vectors, threads = k // vector.width, threads_of(norm) if norm else 1
    chunks = -(-vectors // threads)
    each = -(-TOKENS // warps)  # tokens whose squares a warp adds up

    def taken(x, residual):
        """What is multiplied, or normalised first."""
        return residual if normed else x

    def biased(total, constant):
        return total + constant if spec.bias else total

    def result(acc, constant, t, r, before):
        """An output before it is rounded, for the thread's token t; see `linear_kernel`."""
        if spec.gate is not None:
            gate, up = (biased(acc[t + i * 2], constant[i]) for i in range(2))
            value = gate_product(spec.gate.activation, gate, up)
        else:
            value = biased(acc[t + r * 2], constant[r])
        return value + added.values(before, t + r * 2)[0] if spec.residual else value

    @T.prim_func
    def kernel(x_ptr: T.handle, w_ptr: T.handle, b_ptr: T.handle, r_ptr: T.handle, y_ptr: T.handle):
        T.func_attr({"global_symbol": "linear_few"})
        m = T.int32()
        x, w, bias, residual, y = match_arguments(spec, m, x_ptr, w_ptr, b_ptr, r_ptr, y_ptr)
        T.device_entry()
        block = T.cta_id([row_blocks * ((m + (TOKENS - 1)) // TOKENS)])
        thread = T.thread_id([32 * warps])
        sums = T.alloc_shared([max(1, warps - 1), 32, 4], "float32")
        warp: T.let = thread // 32
        lane: T.let = thread % 32
        row: T.let = lane // 4
        quad: T.let = lane % 4
        token0: T.let = T.truncdiv(block, row_blocks) * TOKENS
        first: T.let = T.truncmod(block, row_blocks) * (8 if gated else _ROWS)
        column: T.let = warp * (steps * STEP) + quad * 4
        weights = T.alloc_local([steps * 4], "uint32")
        values = T.alloc_local([steps * 2], "uint32")
        acc = T.alloc_local([4], "float32")
        others = T.alloc_local([4 * parts], "float32")  # the parts before the last
        constant = T.alloc_local([2], "float32")
        before = added.registers(4)
        rounded = stored.registers()
        scales = T.alloc_shared([TOKENS if normed else 1], "float32")
        gains = T.alloc_local([steps * 4 if normed else 1], "float32")
        rows = vector.registers(chunks * each if normed else 1)
        total = T.alloc_local([1], "float32")

        @T.inline
        def load_rows():
            """Whole rows of the tokens that the warp adds up."""
            for i in T.unroll(each):
                for c in T.unroll(chunks):
                    vector.clear(rows, i * chunks + c)
                    token: T.let = token0 + warp + i * warps
                    at: T.let = lane + c * threads
                    if T.And(T.And(lane < threads, at < vectors), T.And(warp + i * warps < TOKENS, token < m)):
                        vector.load(rows, residual.ptr_to([T.cast(token, "int64"), at * vector.width]), i * chunks + c)

        @T.inline
        def normalise():
            """The values to multiply: see `norm_kernel`."""
            for i in T.unroll(each):
                total[0] = T.float32(0)
                for c in T.unroll(chunks):
                    add_squares(total, vector.values(rows, i * chunks + c))
                total[0] = T.cuda.warp_sum(total[0], threads)
                total[0] = T.rsqrt(total[0] * T.float32(1 / k) + T.float32(eps))
                if T.And(lane == 0, warp + i * warps < TOKENS):
                    scales[warp + i * warps] = total[0]
            T.cuda.cta_sync()
            total[0] = scales[row]
            for i in T.unroll(steps * 2):
                pack_pair(
                    values[i],
                    unpack_pair(values[i], 0, spec.dtype) * total[0] * gains[i * 2],
                    unpack_pair(values[i], 1, spec.dtype) * total[0] * gains[i * 2 + 1],
                    spec.dtype,
                )

        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
        for r in T.unroll(2):
            w_row: T.let = first + row + r * (outs if gated else 8)
            for i in T.unroll(steps):
                if ragged:
                    for j in T.unroll(2):
                        weights[i * 4 + r + j * 2] = T.uint32(0)
                if T.Or(not ragged, w_row < n):
                    T.ptx["ld.global.v2.b32"](
                        weights[i * 4 + r],
                        weights[i * 4 + r + 2],
                        w.ptr_to([T.cast(w_row, "int64"), column + i * STEP]),
                    )
        if normed:
            for i in T.unroll(steps):
                load_floats(gains, lambda at: bias.ptr_to([at]), column + i * STEP, 4, i)
        if spec.bias:
            for r in T.unroll(2):
                constant[r] = bias[T.min(first + row + r * (outs if gated else 8), n - 1)]
        if pdl:
            T.ptx["griddepcontrol.wait"]()
        for i in T.unroll(steps * 2):
            values[i] = T.uint32(0)
        if normed:
            load_rows()
        if token0 + row < m:
            for i in T.unroll(steps):
                T.ptx["ld.global.v2.b32"](
                    values[i * 2],
                    values[i * 2 + 1],
                    taken(x, residual).ptr_to([T.cast(token0 + row, "int64"), column + i * STEP]),
                )
        if normed:
            normalise()
        if spec.residual:
            if warp == warps - 1:
                for t in T.unroll(2):
                    for r in T.unroll(halves):
                        token: T.let = token0 + quad * 2 + t
                        out: T.let = first + row + r * 8
                        added.clear(before, t + r * 2)
                        if T.And(token < m, out < outs):
                            added.load(before, residual.ptr_to([T.cast(token, "int64"), out]), t + r * 2)
        for i in T.unroll(4):
            acc[i] = T.float32(0)
        if T.truncmod(warp, chain) > 0:
            T.ptx["bar.sync"](T.cast(warp, "uint32"), T.uint32(64))
            T.ptx["ld.shared.v4.f32"](*[acc[j] for j in range(4)], sums.ptr_to([warp - 1, lane, 0]))
        for i in T.unroll(steps):
            T.ptx[multiply](
                *[acc[j] for j in range(4)],
                *[weights[i * 4 + j] for j in range(4)],
                *[values[i * 2 + j] for j in range(2)],
                *[acc[j] for j in range(4)],
            )
        if warp < warps - 1:
            T.ptx["st.shared.v4.f32"](sums.ptr_to([warp, lane, 0]), *[acc[j] for j in range(4)])
            if T.truncmod(warp + 1, chain) > 0:
                T.ptx["bar.arrive"](T.cast(warp + 1, "uint32"), T.uint32(64))
            else:
                T.ptx["bar.arrive"](T.uint32(warps), T.uint32(32 * parts))
        else:
            if parts > 1:
                T.ptx["bar.sync"](T.uint32(warps), T.uint32(32 * parts))
                for part in T.unroll(parts - 1):
                    T.ptx["ld.shared.v4.f32"](
                        *[others[part * 4 + j] for j in range(4)], sums.ptr_to([(part + 1) * chain - 1, lane, 0])
                    )
                for j in T.unroll(4):
                    for part in T.unroll(parts - 2):
                        others[j] = others[j] + others[(part + 1) * 4 + j]
                    acc[j] = others[j] + acc[j]
            for t in T.unroll(2):
                for r in T.unroll(halves):
                    token: T.let = token0 + quad * 2 + t
                    out: T.let = first + row + r * 8
                    if T.And(token < m, out < outs):
                        stored.round(rounded, [result(acc, constant, t, r, before)])
                        stored.store(y.ptr_to([T.cast(token, "int64"), out]), rounded)

    return chained(kernel, target)
