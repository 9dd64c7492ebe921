"""The kernel of dense linears on Hopper: y[M, N] = x[M, K] @ W[N, K]^T, weights as the matrix unit's first operand.

A block computes tiles of `rows` outputs for `tokens` tokens. wgmma takes 64 weight rows a warpgroup and 8 to 256
tokens beside them, so few tokens waste nothing but idle matrix units, and many fill them. One warp loads tiles through
TMA into a ring of stages; the others multiply. Weights do not depend on the kernel before: a block fetches as many as
fit before it waits for that one. Blocks are persistent and load the next tile's weights while they finish one.

A sum over K, or a part of one (`parts_of`), is one chain of wgmma steps of 16 in increasing K, and parts are added up
in order, whatever the tile: the same bits for any tokens beside.

Rows of x behind the last token are not loaded: TMA takes as long for what it fills with zeros as for values, and
longer. The last tile of tokens begins early enough to be full, and does not store what the one before it has; where all
tokens are fewer than a load has rows, the load is as short. Loads begin at a multiple of 8 rows, as the swizzle does.

A band of fewer than 64 rows is multiplied as 64: what lies behind it in shared memory gives rows that are not stored.
With a gate, rows are loaded in groups of 8, a group of gate and a group of up by turns, so that a thread holds both
halves of what it activates.
"""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import MBarrier, PipelineState, SMEMPool, TMABar

from tilewright.compiler.composites import LinearSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import deferred
from tilewright.schedules.cuda.activations import gate_product
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.linear_arguments import match_arguments
from tilewright.schedules.cuda.linear_parts import parts_of
from tilewright.schedules.cuda.linear_tile import STAGING_PITCH, STAGING_TOKENS, LinearTile
from tilewright.schedules.cuda.pairs import PTX_TYPES, pack_pair, unpack_pair
from tilewright.schedules.cuda.tma import EVICT_FIRST, EVICT_LAST, ROW, load_tile, tensor_map

_RESIDUALS_AHEAD = 4  # of 16 tokens: what the latency of memory takes to store


@deferred
def linear_kernel(spec: LinearSpec, tile: LinearTile, target: Target) -> Any:
    """Of the arguments in linear_arguments.py."""
    n, k = spec.out_features, spec.in_features
    gated, outs = spec.gate is not None, spec.result_features
    rows, tokens, depth, stages, cluster = tile.rows, tile.tokens, tile.depth, tile.stages, tile.cluster
    chunks, steps = depth // ROW, -(-k // depth)
    bands, wide, threads = tile.bands, tile.wide, tile.threads
    consumers = 128 * bands
    row_blocks = -(-n // (rows * cluster))  # in clusters
    clusters = tile.blocks // cluster
    accumulators = tokens // 2
    early = min(stages, steps)
    sum_parts = parts_of(spec)
    part_steps = steps // sum_parts
    halves = tile.halves
    pieces = 2 if halves else 1  # that the tokens of a tile are loaded in
    slice_rows = tokens // cluster // pieces
    mask = (1 << cluster) - 1 if cluster > 1 else 0
    policy = EVICT_FIRST if tile.weights_once else 0
    x_policy = EVICT_LAST if tile.weights_once else 0
    kind = PTX_TYPES[spec.dtype]
    multiply = f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind}"
    multiply_half = f"wgmma.mma_async.sync.aligned.m64n{tokens // pieces}k16.f32.{kind}.{kind}"
    group = tile.group
    pdl = target.has("pdl")
    # 8 tokens are half of what four 8 x 8 matrices hold.
    span = min(tokens, 16)
    parts = 1 if gated else 2  # of 8 outputs, in the 16 rows of a warp
    matrices = span // 8 * parts  # of a store: 8 tokens by 8 outputs each
    floats = spec.out_dtype == "float32"
    ahead = min(tokens // span, _RESIDUALS_AHEAD)  # chunks of the residual in registers

    def bias_index(out, r):
        """The bias of constant[r], within bounds."""
        return T.min(out, outs - 1) + r * outs if gated else T.min(out + r * 8, n - 1)

    def biased(total, constant):
        return total + constant if spec.bias else total

    def value(acc, total, constant, before, j, r, c, i=0):
        """An output before it is rounded: of tokens 8j..8j+7 the thread's one of column c."""
        sums = total if sum_parts > 1 else acc
        if spec.gate is not None:
            gate, up = (biased(sums[j * 4 + i * 2 + c], constant[i]) for i in range(2))
            result = gate_product(spec.gate.activation, gate, up)
        else:
            result = biased(sums[j * 4 + r * 2 + c], constant[r])
        return result + before[i * 2 + c] if spec.residual else result

    def holds(narrow, token):
        """Whether the tile has its `token`th one."""
        return T.Or(narrow[0] == 0, token < tokens // 2) if halves else True

    @T.prim_func
    def kernel(x_ptr: T.handle, w_ptr: T.handle, b_ptr: T.handle, r_ptr: T.handle, y_ptr: T.handle):
        T.func_attr({"global_symbol": "linear"})
        m = T.int32()
        x, w, bias, residual, y = match_arguments(spec, m, x_ptr, w_ptr, b_ptr, r_ptr, y_ptr)
        x_map: T.let[T.handle("tensormap").ty] = T.tvm_stack_alloca("tensormap", 1)
        w_map: T.let[T.handle("tensormap").ty] = T.tvm_stack_alloca("tensormap", 1)
        tensor_map(x_map, x.data, spec.dtype, (k, m), (k * 2,), (ROW, T.cast(T.min(m, slice_rows), "int64")))
        if gated:
            tensor_map(
                w_map,
                w.data,
                spec.dtype,
                (k, 8, 2, n // 16),
                (k * 2, n * k, k * 16),
                (ROW, 8, 2, rows // 16),
            )
        else:
            tensor_map(w_map, w.data, spec.dtype, (k, n), (k * 2,), (ROW, rows))
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": tile.blocks_per_sm})
        block = T.cta_id([tile.blocks])
        rank = T.cta_id_in_cluster([cluster])
        thread = T.thread_id([threads])
        pool = SMEMPool()
        w_ring = pool.alloc((stages * chunks * rows, ROW), spec.dtype, align=1024)
        x_ring = pool.alloc((stages * chunks * tokens, ROW), spec.dtype, align=1024)
        pool.alloc((tile.overread_bytes,), "uint8")
        staging = pool.alloc((4 * bands, STAGING_TOKENS, STAGING_PITCH), spec.dtype, align=128)
        full = TMABar(pool, stages)
        empty = MBarrier(pool, stages)
        pool.commit()
        full.init(1)
        empty.init(bands * cluster)
        T.ptx["fence.mbarrier_init.release.cluster"]()
        T.cuda.cta_sync()
        if cluster > 1:
            T.ptx["barrier.cluster.arrive.release.aligned"]()
        token_blocks: T.let = (m + (tokens - 1)) // tokens
        whole_turns: T.let = T.truncdiv(row_blocks * token_blocks, clusters)
        rest: T.let = row_blocks * token_blocks - whole_turns * clusters
        # Whether the tiles of the last turn are cut in halves.
        cut: T.let = T.And(T.bool(halves), rest * 2 <= clusters)
        mine: T.let = whole_turns + T.cast(block // cluster < T.Select(cut, rest * 2, rest), "int32")
        filled: T.let = T.truncdiv(m + 7, 8) * 8
        load_bytes: T.let = T.min(m, slice_rows) * (depth * 2)
        at = T.alloc_local([1], "int32")
        deep = T.alloc_local([1], "int32")
        row0 = T.alloc_local([1], "int32")
        token0 = T.alloc_local([1], "int32")
        own0 = T.alloc_local([1], "int32")  # the first token that the tile stores
        ahead0 = T.alloc_local([1], "int32")  # rows from the first token to those that the block loads, or loads second
        narrow = T.alloc_local([1], "int32")  # whether the tile is a half

        @T.inline
        def place(turn):
            """Where the block's tile of a turn is: up to `group` blocks of tokens share weights in the cache."""
            at[0] = block // cluster + turn * clusters
            if halves:
                narrow[0] = T.cast(T.And(cut, turn == whole_turns), "int32")
                at[0] = T.Select(narrow[0] > 0, turn * clusters + block // 2, at[0])
            token0[0] = T.truncdiv(at[0], group * row_blocks) * group
            deep[0] = T.min(token_blocks - token0[0], group)
            at[0] = at[0] - token0[0] * row_blocks
            row0[0] = T.truncdiv(at[0], deep[0])
            token0[0] = (token0[0] + at[0] - row0[0] * deep[0]) * tokens
            row0[0] = (row0[0] * cluster + rank) * rows
            if halves:
                token0[0] = token0[0] + narrow[0] * (block % 2) * (tokens // 2)
            own0[0] = token0[0]
            extent: T.let = T.Select(narrow[0] > 0, tokens // 2, tokens) if halves else tokens
            token0[0] = T.min(token0[0], T.max(filled - extent, 0))
            ahead0[0] = T.min(slice_rows if halves else rank * slice_rows, T.max(filled - slice_rows, 0) - token0[0])

        @T.inline
        def load_weights(stage, step):
            for c in T.unroll(chunks):
                if gated:
                    load_tile(
                        w_ring.ptr_to([(stage * chunks + c) * rows, 0]),
                        w_map,
                        (step * depth + c * ROW, 0, 0, T.truncdiv(row0[0], 16)),
                        full.ptr_to([stage]),
                        policy,
                    )
                else:
                    load_tile(
                        w_ring.ptr_to([(stage * chunks + c) * rows, 0]),
                        w_map,
                        (step * depth + c * ROW, row0[0]),
                        full.ptr_to([stage]),
                        policy,
                    )

        @T.inline
        def load_tokens(stage, step):
            for c in T.unroll(chunks):
                load_tile(
                    x_ring.ptr_to([(stage * chunks + c) * tokens + (0 if halves else ahead0[0]), 0]),
                    x_map,
                    (step * depth + c * ROW, token0[0] + (0 if halves else ahead0[0])),
                    full.ptr_to([stage]),
                    x_policy,
                    mask,
                )
                if halves:
                    if narrow[0] == 0:
                        load_tile(
                            x_ring.ptr_to([(stage * chunks + c) * tokens + ahead0[0], 0]),
                            x_map,
                            (step * depth + c * ROW, token0[0] + ahead0[0]),
                            full.ptr_to([stage]),
                            x_policy,
                            mask,
                        )

        @T.inline
        def expect(stage):
            """The bytes of a stage are on their way."""
            if halves:
                full.arrive(stage, tx_count=rows * depth * 2 + load_bytes * T.Select(narrow[0] > 0, 1, 2))
            else:
                full.arrive(stage, tx_count=rows * depth * 2 + load_bytes * cluster)

        if thread >= consumers:
            if wide:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](40)
            if pdl:
                T.ptx["griddepcontrol.launch_dependents"]()
            if T.And(thread == consumers, mine > 0):
                place(0)
                for s in T.unroll(early):
                    expect(s)
                    load_weights(s, s)
            T.cuda.warp_sync()
            if cluster > 1:
                T.ptx["barrier.cluster.wait.acquire.aligned"]()
            if pdl:
                T.ptx["griddepcontrol.wait"]()
            if thread == consumers:
                if mine > 0:
                    for s in T.unroll(early):
                        load_tokens(s, s)
                producer = PipelineState(stages, 1)
                for _ in T.unroll(early):
                    producer.advance()
                for turn in T.serial(mine):
                    place(turn)
                    first: T.int32 = T.Select(turn == 0, early, 0)
                    for step in T.serial(steps - first):
                        empty.wait(producer.stage, producer.phase)
                        expect(producer.stage)
                        load_weights(producer.stage, first + step)
                        load_tokens(producer.stage, first + step)
                        producer.advance()
        else:
            if wide:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](232)
            band: T.let = thread // 128
            warp: T.let = thread // 32
            lane: T.let = thread % 32
            acc = T.alloc_local([accumulators], "float32")
            total = T.alloc_local([accumulators if sum_parts > 1 else 1], "float32")
            w_desc = T.alloc_local([1], "uint64")
            x_desc = T.alloc_local([1], "uint64")
            packed = T.alloc_local([4], "uint32")
            before = T.alloc_local([8], "float32")
            residuals = T.alloc_local([4 * ahead], "uint32")
            constant = T.alloc_local([2], "float32")
            last = T.alloc_local([1], "int32")
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(w_desc[0]), w_ring.ptr_to([band * 64, 0]), 1, 64, 3)
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(x_desc[0]), x_ring.ptr_to([0, 0]), 1, 64, 3)
            if cluster > 1:
                T.ptx["barrier.cluster.wait.acquire.aligned"]()
            if pdl:
                T.ptx["griddepcontrol.wait"]()

            @T.inline
            def release(stage):
                if thread % 128 < cluster:
                    if cluster > 1:
                        empty.arrive(stage, remote=thread % 128)
                    else:
                        empty.arrive(stage)

            @T.inline
            def fetch_residual(chunk):
                """A chunk of the residual, on its way while others are multiplied or stored."""
                fetched_token: T.let = token0[0] + chunk * span + lane // parts
                fetched_out: T.let = (
                    T.truncdiv(row0[0], 2) + warp * 8 if gated else row0[0] + warp * 16
                ) + lane % parts * 8
                for i in T.unroll(4):
                    residuals[chunk % ahead * 4 + i] = T.uint32(0)
                if T.And(T.And(warp * 16 < rows, lane < span * parts), T.And(fetched_token < m, fetched_out < outs)):
                    T.ptx["ld.global.v4.b32"](
                        *[residuals[chunk % ahead * 4 + i] for i in range(4)],
                        residual.ptr_to([fetched_token, fetched_out]),
                    )

            consumer = PipelineState(stages, 0)

            @T.inline
            def multiply_all(instruction, count):
                """A tile's sums over all of K, in acc[:count], or in total where they have parts."""
                for step in T.serial(steps):
                    full.wait(consumer.stage, consumer.phase)
                    T.ptx["wgmma.fence.sync.aligned"]()
                    for c in T.unroll(chunks):
                        for i in T.unroll(4):
                            T.ptx[instruction](
                                *[acc[j] for j in range(count)],
                                w_desc[0] + T.cast((consumer.stage * chunks + c) * (rows * 8) + i * 2, "uint64"),
                                x_desc[0] + T.cast((consumer.stage * chunks + c) * (tokens * 8) + i * 2, "uint64"),
                                T.Or(T.truncmod(step, part_steps) > 0, c * 4 + i > 0),
                                1,
                                1,
                                0,
                                0,
                            )
                    T.ptx["wgmma.commit_group.sync.aligned"]()
                    T.ptx["wgmma.wait_group.sync.aligned"](1)
                    if step > 0:
                        release(last[0])
                    last[0] = consumer.stage
                    consumer.advance()
                    if sum_parts > 1:
                        if T.truncmod(step + 1, part_steps) == 0:
                            T.ptx["wgmma.wait_group.sync.aligned"](0)
                            for j in T.unroll(count):
                                total[j] = T.Select(step + 1 == part_steps, acc[j], total[j] + acc[j])

            for turn in T.serial(mine):
                place(turn)
                if spec.residual:
                    for chunk in T.unroll(ahead):
                        fetch_residual(chunk)
                if halves:
                    if narrow[0] > 0:
                        multiply_all(multiply_half, accumulators // 2)
                    else:
                        multiply_all(multiply, accumulators)
                else:
                    multiply_all(multiply, accumulators)
                T.ptx["wgmma.wait_group.sync.aligned"](0)
                release(last[0])

                # What a row adds, in the order of acc: two outputs apart by 8, or the gate's and the other half's.
                first_out: T.let = T.truncdiv(row0[0], 2) + warp * 8 if gated else row0[0] + warp * 16
                if spec.bias:
                    for r in T.unroll(2):
                        constant[r] = bias[bias_index(first_out + lane // 4, r)]
                if warp * 16 < rows:
                    if floats:
                        for j in T.unroll(tokens // 8):
                            for i in T.unroll(1 if gated else 2):
                                for c in T.unroll(2):
                                    token: T.let = token0[0] + j * 8 + lane % 4 * 2 + c
                                    out: T.let = first_out + i * 8 + lane // 4
                                    if T.And(
                                        T.And(T.And(token >= own0[0], token < m), out < outs), holds(narrow, j * 8)
                                    ):
                                        y[token, out] = value(acc, total, constant, before, j, i, c)
                    else:
                        for chunk in T.unroll(tokens // span):
                            if T.And(token0[0] + chunk * span < m, holds(narrow, chunk * span)):
                                store_token: T.let = token0[0] + chunk * span + lane // parts
                                store_out: T.let = first_out + lane % parts * 8
                                stored: T.let = T.And(
                                    T.And(lane < span * parts, store_out < outs),
                                    T.And(store_token >= own0[0], store_token < m),
                                )
                                matrix: T.let = lane // 8 % matrices
                                matrix_token: T.let = matrix // parts * 8 + lane % 8
                                if spec.residual:
                                    if lane < span * parts:
                                        T.ptx["st.shared.v4.b32"](
                                            staging.ptr_to([warp, lane // parts, lane % parts * 8]),
                                            *[residuals[chunk % ahead * 4 + i] for i in range(4)],
                                        )
                                    if chunk + ahead < tokens // span:
                                        fetch_residual(chunk + ahead)
                                    T.cuda.warp_sync()
                                    T.ptx[f"ldmatrix.sync.aligned.m8n8.x{matrices}.trans.shared.b16"](
                                        *[packed[i] for i in range(matrices)],
                                        staging.ptr_to([warp, matrix_token, matrix % parts * 8]),
                                    )
                                    T.cuda.warp_sync()
                                    for i in T.unroll(matrices):
                                        for c in T.unroll(2):
                                            before[i * 2 + c] = unpack_pair(packed[i], c, spec.dtype)
                                for i in T.unroll(matrices):
                                    j: T.let = chunk * (span // 8) + i // parts
                                    pack_pair(
                                        packed[i],
                                        value(acc, total, constant, before, j, i % parts, 0, i),
                                        value(acc, total, constant, before, j, i % parts, 1, i),
                                        spec.out_dtype,
                                    )
                                T.ptx[f"stmatrix.sync.aligned.m8n8.x{matrices}.trans.shared.b16"](
                                    staging.ptr_to([warp, matrix_token, matrix % parts * 8]),
                                    *[packed[i] for i in range(matrices)],
                                )
                                T.cuda.warp_sync()
                                if stored:
                                    T.ptx["ld.shared.v4.b32"](
                                        packed[0],
                                        packed[1],
                                        packed[2],
                                        packed[3],
                                        staging.ptr_to([warp, lane // parts, lane % parts * 8]),
                                    )
                                    T.ptx["st.global.v4.b32"](
                                        y.ptr_to([store_token, store_out]), packed[0], packed[1], packed[2], packed[3]
                                    )
                                T.cuda.warp_sync()
        if cluster > 1:
            # No block may end while another still sends to it.
            T.ptx["barrier.cluster.arrive.relaxed.aligned"]()
            T.ptx["barrier.cluster.wait.acquire.aligned"]()

    return chained(kernel, target, cluster=cluster > 1, shared=True)
