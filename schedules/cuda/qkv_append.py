"""From the joint projection into attention: split, normalise and rotate q and k, put k and v into the pages.

qkv[m,(H+2G)*D], cos f32[m,D/2], sin f32[m,D/2], (q_norm f32[D], k_norm f32[D]), pages, slots i32[m], layer
    -> q[m,H,D], pages in place; qkv and q of the spec's dtype

A head of a token is a group of threads, each of which holds the same part of both halves of it: the pairs that rotate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tilewright.compiler.composites import KVFormat, QKVAppendSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule, deferred
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.rows import (
    BYTES,
    WARP,
    Vector,
    VectorTile,
    add_squares,
    add_up,
    load_floats,
    power_of_two,
    refuse_dtype,
)

PAGES = ("bfloat16", "float16")  # dtypes
MOST_VALUES = 16  # of half a head in one thread's registers
MOST_HEAD_DIM = 2 * WARP * MOST_VALUES


@dataclass(frozen=True)
class AppendFacts:
    spec: QKVAppendSpec


class QKVAppend(Schedule):
    name = "qkv_append"
    composite = "qkv_append"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> AppendFacts | Reject:
        kv, norm = call.spec.kv, call.spec.norm
        if norm and norm.features != kv.head_dim:
            return Reject(f"a norm over {norm.features} features does not fit heads of {kv.head_dim}")
        return _refuse_pages(kv) or refuse_dtype(call.spec.dtype) or AppendFacts(call.spec)

    def space(self, facts: AppendFacts, target: Target) -> Sequence[VectorTile]:
        return VectorTile(64), VectorTile(128)

    def floor(self, facts: AppendFacts, target: Target) -> Floor:
        spec, kv = facts.spec, facts.spec.kv
        rows = (spec.heads + 2 * kv.kv_heads) * kv.head_dim, spec.heads * kv.head_dim
        stored = 2 * kv.kv_heads * kv.head_dim * BYTES[kv.dtype]
        return Floor(
            bytes_fixed=8 * kv.head_dim if spec.norm else 0,
            bytes_per_row=sum(rows) * BYTES[spec.dtype] + 4 * kv.head_dim + 4 + stored,
            flops_per_row=(7 if spec.norm else 3) * (spec.heads + kv.kv_heads) * kv.head_dim,
        )

    def apply(self, facts: AppendFacts, tile: VectorTile, target: Target) -> Lowering:
        spec = facts.spec
        norms = 2 if spec.norm else 0
        # Without norms the kernel takes the angles in their place, and does not read them there.
        weights = (3, 4) if spec.norm else (1, 2)
        out = Output("q", ("m", spec.heads, spec.kv.head_dim), spec.dtype)
        inputs = (0, 1, 2, *weights, 3 + norms, 4 + norms, 5 + norms)
        func = append_kernel(spec, tile, target)
        return Lowering((KernelCall(func, inputs, (out,)),), ("q", 3 + norms))


def _refuse_pages(kv: KVFormat) -> Reject | None:
    if kv.k_transposed:
        return Reject("keys of a page lie [dim, slot]; a GPU has them [slot, dim]")
    if kv.dtype not in PAGES:
        return Reject(f"pages of {kv.dtype} are none of {', '.join(PAGES)}")
    if kv.head_dim % 2 or kv.head_dim > MOST_HEAD_DIM:
        return Reject(f"head size {kv.head_dim} is not even or above {MOST_HEAD_DIM}")
    return None


@deferred
def append_kernel(spec: QKVAppendSpec, tile: VectorTile, target: Target) -> Any:
    """(qkv, cos, sin, q_norm, k_norm, pages, slots, layer, q) as above; norms that the spec has not are not read."""
    kv, norm = spec.kv, spec.norm
    dim, half, page_size = kv.head_dim, kv.head_dim // 2, kv.page_size
    rotated, heads = spec.heads + kv.kv_heads, spec.heads + 2 * kv.kv_heads
    source, paged = Vector.widest([spec.dtype, kv.dtype], half)
    width = source.width
    vectors = half // width
    lanes = min(WARP, power_of_two(vectors))
    chunks = -(-vectors // lanes)
    groups = tile.threads // lanes
    normed, eps = norm is not None, norm.eps if norm else 0.0
    pdl = target.has("pdl")

    def every(x: Any) -> list[Any]:
        return [x[i] for i in range(chunks * width)]

    def widen(out: Any, raw: Any, c: Any) -> None:
        for i, value in enumerate(source.values(raw, c)):
            T.buffer_store(out, value, [c * width + i])

    def normalise(x: Any, factor: Any, weights: Any) -> None:
        for i in range(chunks * width):
            T.buffer_store(x, x[i] * factor[0] * weights[i], [i])

    def rotate(a: Any, b: Any, cos: Any, sin: Any, old: Any) -> None:
        """a, b = a * cos - b * sin, b * cos + a * sin"""
        for i in range(chunks * width):
            T.buffer_store(old, a[i], [0])
            T.buffer_store(a, b[i] * sin[i], [i])
            T.evaluate(T.ptx["fma.rn.f32"](a[i], old[0], cos[i], -a[i]))
            T.buffer_store(old, old[0] * sin[i], [0])
            T.evaluate(T.ptx["fma.rn.f32"](b[i], b[i], cos[i], old[0]))

    def put(vector: Vector, address: Any, x: Any, c: Any) -> None:
        rounded = vector.registers()
        vector.round(rounded, [x[c * width + i] for i in range(width)])
        vector.store(address, rounded)

    @T.prim_func
    def kernel(
        qkv_ptr: T.handle,
        cos_ptr: T.handle,
        sin_ptr: T.handle,
        q_norm_ptr: T.handle,
        k_norm_ptr: T.handle,
        pages_ptr: T.handle,
        slots_ptr: T.handle,
        layer: T.int64,
        q_ptr: T.handle,
    ):
        T.func_attr({"global_symbol": "qkv_append"})
        m = T.int32()
        num_pages = T.int32()
        qkv = T.match_buffer(qkv_ptr, (m, heads * dim), spec.dtype)
        cosines = T.match_buffer(cos_ptr, (m, half), "float32")
        sines = T.match_buffer(sin_ptr, (m, half), "float32")
        if normed:
            q_norm = T.match_buffer(q_norm_ptr, (dim,), "float32")
            k_norm = T.match_buffer(k_norm_ptr, (dim,), "float32")
        pages = T.match_buffer(pages_ptr, (kv.layers, num_pages, 2, kv.kv_heads, page_size * dim), kv.dtype)
        slots = T.match_buffer(slots_ptr, (m,), "int32")
        q = T.match_buffer(q_ptr, (m, spec.heads, dim), spec.dtype)
        T.device_entry()
        block = T.cta_id([(m * heads + (groups - 1)) // groups])
        thread = T.thread_id([tile.threads])
        lane: T.let = thread % lanes
        token: T.let = T.truncdiv(block * groups + thread // lanes, heads)
        head: T.let = T.truncmod(block * groups + thread // lanes, heads)
        raw_a = source.registers(chunks)
        raw_b = source.registers(chunks)
        a = T.alloc_local([chunks * width], "float32")
        b = T.alloc_local([chunks * width], "float32")
        cos = T.alloc_local([chunks * width], "float32")
        sin = T.alloc_local([chunks * width], "float32")
        weights_a = T.alloc_local([chunks * width], "float32")
        weights_b = T.alloc_local([chunks * width], "float32")
        slot = T.alloc_local([1], "int32")
        total = T.alloc_local([1], "float32")
        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
        if normed:
            for c in T.unroll(chunks):
                at: T.let = (lane + c * lanes) * width
                if at < half:
                    if head < spec.heads:
                        load_floats(weights_a, lambda i: q_norm.ptr_to([i]), at, width, c)
                        load_floats(weights_b, lambda i: q_norm.ptr_to([i]), at + half, width, c)
                    else:
                        load_floats(weights_a, lambda i: k_norm.ptr_to([i]), at, width, c)
                        load_floats(weights_b, lambda i: k_norm.ptr_to([i]), at + half, width, c)
        if pdl:
            T.ptx["griddepcontrol.wait"]()
        slot[0] = -1
        if token < m:
            T.ptx["ld.global.b32"](slot[0], slots.ptr_to([token]))
        for c in T.unroll(chunks):
            at: T.let = (lane + c * lanes) * width
            source.clear(raw_a, c)
            source.clear(raw_b, c)
            if T.And(at < half, token < m):
                source.load(raw_a, qkv.ptr_to([token, head * dim + at]), c)
                source.load(raw_b, qkv.ptr_to([token, head * dim + half + at]), c)
                if head < rotated:
                    load_floats(cos, lambda i: cosines.ptr_to([token, i]), at, width, c)
                    load_floats(sin, lambda i: sines.ptr_to([token, i]), at, width, c)
        for c in T.unroll(chunks):
            widen(a, raw_a, c)
            widen(b, raw_b, c)
        if normed:
            total[0] = T.float32(0)
            add_squares(total, every(a))
            add_squares(total, every(b))
            add_up(total, thread, lanes)
            total[0] = T.rsqrt(total[0] * T.float32(1 / dim) + T.float32(eps))
        if head < rotated:
            if normed:
                normalise(a, total, weights_a)
                normalise(b, total, weights_b)
            rotate(a, b, cos, sin, total)
        value: T.let = T.Select(head < rotated, 0, 1)
        group: T.let = head - spec.heads - value * kv.kv_heads
        for c in T.unroll(chunks):
            at: T.let = (lane + c * lanes) * width
            if T.And(at < half, token < m):
                if head < spec.heads:
                    put(source, q.ptr_to([token, head, at]), a, c)
                    put(source, q.ptr_to([token, head, half + at]), b, c)
                else:
                    if slot[0] >= 0:
                        page: T.let = T.cast(T.truncdiv(slot[0], page_size), "int64")
                        row: T.let = T.truncmod(slot[0], page_size) * dim
                        put(paged, pages.ptr_to([layer, page, value, group, row + at]), a, c)
                        put(paged, pages.ptr_to([layer, page, value, group, row + half + at]), b, c)

    return chained(kernel, target)
