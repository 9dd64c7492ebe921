"""A gate on its own: activation(x[:, :I]) * x[:, I:], x[m, 2I] -> [m, I], dtype of the spec."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tilewright.compiler.composites import GatedSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule, deferred
from tilewright.schedules.cuda.activations import gate_product
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.rows import BYTES, Vector, VectorTile, refuse_dtype

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class GatedFacts:
    spec: GatedSpec


class Gated(Schedule):
    name = "gated"
    composite = "gated"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> GatedFacts | Reject:
        if call.spec.activation not in ACTIVATIONS:
            return Reject(f"activation {call.spec.activation!r} is none of {', '.join(ACTIVATIONS)}")
        return refuse_dtype(call.spec.dtype) or GatedFacts(call.spec)

    def space(self, facts: GatedFacts, target: Target) -> Sequence[VectorTile]:
        return VectorTile(128), VectorTile(256)

    def floor(self, facts: GatedFacts, target: Target) -> Floor:
        features = facts.spec.features
        return Floor(0, bytes_per_row=3 * BYTES[facts.spec.dtype] * features, flops_per_row=24 * features)

    def apply(self, facts: GatedFacts, tile: VectorTile, target: Target) -> Lowering:
        out = Output("y", ("m", facts.spec.features), facts.spec.dtype)
        func = gated_kernel(facts.spec, tile, target)
        return Lowering((KernelCall(func, (0,), (out,)),), ("y",))


@deferred
def gated_kernel(spec: GatedSpec, tile: VectorTile, target: Target) -> Any:
    """(x[m,2I], y[m,I]) of spec.dtype."""
    features = spec.features
    (vector,) = Vector.widest([spec.dtype], features)
    width = vector.width
    vectors = features // width
    pdl = target.has("pdl")

    def product(gate: Any, up: Any) -> list[Any]:
        pairs = zip(vector.values(gate), vector.values(up), strict=True)
        return [gate_product(spec.activation, g, u) for g, u in pairs]

    @T.prim_func
    def kernel(x_ptr: T.handle, y_ptr: T.handle):
        T.func_attr({"global_symbol": "gated"})
        m = T.int32()
        x = T.match_buffer(x_ptr, (m, 2 * features), spec.dtype)
        y = T.match_buffer(y_ptr, (m, features), spec.dtype)
        T.device_entry()
        block = T.cta_id([(m * vectors + (tile.threads - 1)) // tile.threads])
        thread = T.thread_id([tile.threads])
        at: T.let = block * tile.threads + thread
        row: T.let = T.truncdiv(at, vectors)
        column: T.let = T.truncmod(at, vectors) * width
        gate = vector.registers()
        up = vector.registers()
        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
            T.ptx["griddepcontrol.wait"]()
        if row < m:
            vector.load(gate, x.ptr_to([row, column]))
            vector.load(up, x.ptr_to([row, features + column]))
            vector.round(gate, product(gate, up))
            vector.store(y.ptr_to([row, column]), gate)

    return chained(kernel, target)
