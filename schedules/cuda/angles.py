"""Angles of positions: positions i32[m], frequencies f32[D/2] -> cos, sin of their products, f32[m, D/2] each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tilewright.compiler.composites import AnglesSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule, deferred
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.rows import VectorTile

_FLOPS = 40  # of a cosine and a sine with the reduction of their argument, about


@dataclass(frozen=True)
class AnglesFacts:
    spec: AnglesSpec


class Angles(Schedule):
    name = "angles"
    composite = "angles"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> AnglesFacts | Reject:
        return AnglesFacts(call.spec)

    def space(self, facts: AnglesFacts, target: Target) -> Sequence[VectorTile]:
        return VectorTile(128), VectorTile(256)

    def floor(self, facts: AnglesFacts, target: Target) -> Floor:
        half = facts.spec.head_dim // 2
        return Floor(4 * half, bytes_per_row=4 + 8 * half, flops_per_row=_FLOPS * half)

    def apply(self, facts: AnglesFacts, tile: VectorTile, target: Target) -> Lowering:
        outputs = tuple(Output(name, ("m", facts.spec.head_dim // 2), "float32") for name in ("cos", "sin"))
        func = angles_kernel(facts.spec, tile, target)
        return Lowering((KernelCall(func, (0, 1), outputs),), ("cos", "sin"))


@deferred
def angles_kernel(spec: AnglesSpec, tile: VectorTile, target: Target) -> Any:
    """(positions i32[m], frequencies f32[D/2], cos f32[m,D/2], sin f32[m,D/2]); a thread for each angle. In full
    accuracy: a position of 100,000 is an angle of as many radians."""
    half, pdl = spec.head_dim // 2, target.has("pdl")

    @T.prim_func
    def kernel(positions_ptr: T.handle, frequencies_ptr: T.handle, cos_ptr: T.handle, sin_ptr: T.handle):
        T.func_attr({"global_symbol": "angles"})
        m = T.int32()
        positions = T.match_buffer(positions_ptr, (m,), "int32")
        frequencies = T.match_buffer(frequencies_ptr, (half,), "float32")
        cos = T.match_buffer(cos_ptr, (m, half), "float32")
        sin = T.match_buffer(sin_ptr, (m, half), "float32")
        T.device_entry()
        block = T.cta_id([(m * half + (tile.threads - 1)) // tile.threads])
        thread = T.thread_id([tile.threads])
        at: T.let = block * tile.threads + thread
        row: T.let = T.truncdiv(at, half)
        column: T.let = T.truncmod(at, half)
        position = T.alloc_local([1], "int32")
        angle = T.alloc_local([1], "float32")
        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
            T.ptx["griddepcontrol.wait"]()
        if row < m:
            T.ptx["ld.global.b32"](position[0], positions.ptr_to([row]))
            T.ptx["ld.global.b32"](angle[0], frequencies.ptr_to([column]))
            angle[0] = T.cast(position[0], "float32") * angle[0]
            cos[row, column] = T.cos(angle[0])
            sin[row, column] = T.sin(angle[0])

    return chained(kernel, target)
