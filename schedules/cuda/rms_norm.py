"""RMS norm: x[m, ..inner.., K] * rsqrt(mean(x^2) + eps) * weight f32[K] -> [m, ..inner.., K], dtype of the spec."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script import tirx as T

from tilewright.compiler.composites import NormSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule, deferred
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.rows import (
    BYTES,
    MOST_THREADS,
    WARP,
    Vector,
    add_squares,
    add_up,
    load_floats,
    power_of_two,
    refuse_dtype,
)

MOST_VALUES = 32  # of a row in one thread's registers
MOST_FEATURES = MOST_THREADS * MOST_VALUES
_WARP_VECTORS = 4  # of a row in one thread's registers, where a warp takes it
WARP_FEATURES = _WARP_VECTORS * WARP * 8  # of a row of 16-bit values that a warp takes


@dataclass(frozen=True)
class NormFacts:
    spec: NormSpec
    inner: tuple[int, ...]  # the dimensions between m and K


@dataclass(frozen=True)
class NormTile:
    """threads: of a row, a power of two; the order of its sum depends on them. rows: of a block, one where a row takes
    more than a warp."""

    threads: int
    rows: int

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MOST_THREADS or self.threads & (self.threads - 1):
            raise ValueError(f"{self.threads} threads of a row are no power of two up to {MOST_THREADS}")
        if self.rows < 1 or self.block % WARP or self.block > MOST_THREADS:
            raise ValueError(
                f"{self.rows} rows of {self.threads} threads are no block of up to {MOST_THREADS / WARP:.0f} warps"
            )
        if self.threads > WARP and self.rows > 1:
            raise ValueError(f"{self.rows} rows share a block, and each takes {self.threads} threads, more than a warp")

    @property
    def block(self) -> int:
        """Threads of a block."""
        return self.threads * self.rows


class RMSNorm(Schedule):
    name = "rms_norm"
    composite = "rms_norm"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> NormFacts | Reject:
        if call.spec.features > MOST_FEATURES:
            return Reject(f"rows of {call.spec.features} features are longer than {MOST_FEATURES}")
        return refuse_dtype(call.spec.dtype) or NormFacts(call.spec, call.inner)

    def space(self, facts: NormFacts, target: Target) -> Sequence[NormTile]:
        """Tiles that differ in rows alone: a row's bits depend on its threads."""
        threads = threads_of(facts.spec)
        if threads > WARP:
            return (NormTile(threads, 1),)
        return tuple(NormTile(threads, WARP * warps // threads) for warps in (4, 1))

    def floor(self, facts: NormFacts, target: Target) -> Floor:
        features = facts.spec.features
        each = prod(facts.inner) * features
        return Floor(4 * features, bytes_per_row=2 * BYTES[facts.spec.dtype] * each, flops_per_row=4 * each)

    def apply(self, facts: NormFacts, tile: NormTile, target: Target) -> Lowering:
        spec = facts.spec
        out = Output("y", ("m", *facts.inner, spec.features), spec.dtype)
        func = norm_kernel(spec, facts.inner, tile, target)
        return Lowering((KernelCall(func, (0, 1), (out,)),), ("y",))


def threads_of(spec: NormSpec) -> int:
    """The threads of a row. A warp needs no barrier, so it takes rows of up to four vectors a thread; of longer rows a
    thread has two, and more only where they would need more threads than share a barrier cheaply."""
    (vector,) = Vector.widest([spec.dtype], spec.features)
    vectors = spec.features // vector.width
    if vectors <= _WARP_VECTORS * WARP:
        return min(WARP, power_of_two(vectors))
    threads = min(512, power_of_two(-(-vectors // 2)))
    return threads if spec.features <= threads * MOST_VALUES else MOST_THREADS


@deferred
def norm_kernel(spec: NormSpec, inner: tuple[int, ...], tile: NormTile, target: Target) -> Any:
    """(x[m,..inner..,K], weight f32[K], y[m,..inner..,K]); x and y of spec.dtype."""
    features, each = spec.features, prod(inner)
    (vector,) = Vector.widest([spec.dtype], features)
    width, vectors = vector.width, features // vector.width
    chunks = -(-vectors // tile.threads)
    pdl = target.has("pdl")

    def scaled(x: Any, weights: Any, total: Any, c: Any) -> list[Any]:
        return [value * total[0] * weights[c * width + i] for i, value in enumerate(vector.values(x, c))]

    @T.prim_func
    def kernel(x_ptr: T.handle, w_ptr: T.handle, y_ptr: T.handle):
        T.func_attr({"global_symbol": "rms_norm"})
        m = T.int32()
        x_rows = T.match_buffer(x_ptr, (m, *inner, features), spec.dtype)
        weight = T.match_buffer(w_ptr, (features,), "float32")
        y_rows = T.match_buffer(y_ptr, (m, *inner, features), spec.dtype)
        x = T.decl_buffer((m * each, features), spec.dtype, data=x_rows.data)
        y = T.decl_buffer((m * each, features), spec.dtype, data=y_rows.data)
        T.device_entry()
        block = T.cta_id([(m * each + (tile.rows - 1)) // tile.rows])
        thread = T.thread_id([tile.block])
        lane: T.let = thread % tile.threads
        row: T.let = block * tile.rows + thread // tile.threads
        values = vector.registers(chunks)
        weights = T.alloc_local([chunks * width], "float32")
        total = T.alloc_local([1], "float32")
        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
        for c in T.unroll(chunks):
            if lane + c * tile.threads < vectors:
                load_floats(weights, lambda i: weight.ptr_to([i]), (lane + c * tile.threads) * width, width, c)
        if pdl:
            T.ptx["griddepcontrol.wait"]()
        for c in T.unroll(chunks):
            vector.clear(values, c)
            if T.And(lane + c * tile.threads < vectors, row < m * each):
                vector.load(values, x.ptr_to([row, (lane + c * tile.threads) * width]), c)
        total[0] = T.float32(0)
        for c in T.unroll(chunks):
            add_squares(total, vector.values(values, c))
        add_up(total, thread, tile.threads)
        total[0] = T.rsqrt(total[0] * T.float32(1 / features) + T.float32(spec.eps))
        for c in T.unroll(chunks):
            if T.And(lane + c * tile.threads < vectors, row < m * each):
                vector.round(values, scaled(values, weights, total, c), c)
                vector.store(y.ptr_to([row, (lane + c * tile.threads) * width]), values, c)

    return chained(kernel, target)
