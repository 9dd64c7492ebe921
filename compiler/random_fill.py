"""Weights that are made where they are used: a function of the program fills them on the device.

So a model of any size can be measured without a file of weights. The values are those of no checkpoint, and not
those of compiler/frontends/random_weights.py, which a host makes; in mean and deviation they are alike.
"""

import hashlib
import json
from functools import lru_cache
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import op
from tvm.script import tirx as T

DEVIATION = 0.02  # of weights and biases, as models are initialised; keeps activations near 1 at any depth
NORM_DEVIATION = 0.1  # of norm weights around 1


def add_fill(mod: tvm.IRModule, seed: int) -> tvm.IRModule:
    """The scheduled module with `fill(*weights)`, which writes every weight of `step` in place and returns them all.

    A value is mean + deviation * z with z a sum of four uniform numbers, scaled to deviation 1 (Irwin and Hall 1927),
    from a hash of its place, the weight's name and the seed.
    """
    step = mod["step"]
    entries = json.loads(str(step.attrs["tw.params"]))
    weights = [relax.Var(p.name, p.ty) for p in step.params[int(step.attrs["num_input"]) :]]
    builder = relax.BlockBuilder(mod)
    with builder.function("fill", weights, attrs={"num_input": 0}):
        with builder.dataflow():
            filled = [_filled(builder, w, e, seed) for w, e in zip(weights, entries, strict=True)]
            output = builder.emit_output(relax.Tuple(filled))
        builder.emit_func_output(output)
    return builder.get()


def _filled(builder: relax.BlockBuilder, weight: Any, entry: dict[str, Any], seed: int) -> Any:
    norm = entry["name"].endswith("norm")
    shape = tuple(int(s) for s in weight.ty.shape.values)
    kernel = builder.add_func(_kernel(shape, str(weight.ty.dtype), norm), "fill_tir")
    digest = hashlib.sha256(f"{seed}:{entry['name']}".encode()).digest()
    key = relax.prim_value(int.from_bytes(digest[:4], "little"))
    return builder.emit(op.call_tir_inplace(kernel, [weight, builder.emit(key)], 0, weight.ty))


@lru_cache(maxsize=64)  # layers are alike, and to write one down takes 40 ms
def _kernel(shape: tuple[int, ...], dtype: str, norm: bool) -> tirx.PrimFunc:
    """(weight of one or two dimensions, key): every value by its place in row-major order."""
    mean, deviation = (1.0, NORM_DEVIATION) if norm else (0.0, DEVIATION)
    scale = deviation * 3**0.5  # a sum of four uniforms of [-0.5, 0.5) has deviation 3 ** -0.5
    rows, columns = (tirx.IntImm("int64", extent) for extent in (1, 1, *shape)[-2:])

    def value(place, key):
        return T.Cast(dtype, T.float32(mean) + T.float32(scale) * _sum(place, key))

    @T.prim_func(private=True, s_tir=True)
    def fill_vector(weight_handle: T.handle, key: T.int64):
        T.func_attr({"tirx.noalias": True})
        weight = T.match_buffer(weight_handle, (columns,), dtype)
        for i in T.serial(columns):
            with T.sblock("fill"):
                at = T.axis.spatial(columns, i)
                weight[at] = value(at, key)

    @T.prim_func(private=True, s_tir=True)
    def fill_matrix(weight_handle: T.handle, key: T.int64):
        T.func_attr({"tirx.noalias": True})
        weight = T.match_buffer(weight_handle, (rows, columns), dtype)
        for i, j in T.grid(rows, columns):
            with T.sblock("fill"):
                row, column = T.axis.remap("SS", [i, j])
                weight[row, column] = value(row * columns + column, key)

    return fill_vector if len(shape) == 1 else fill_matrix


def _sum(place: Any, key: Any) -> Any:
    """Four uniform numbers of [-0.5, 0.5), added: the halves of two hashed words."""
    first = _mix(_word(T.Cast("uint64", place) ^ T.Cast("uint64", key)))
    second = _mix(_word(first + T.uint64(0x9E3779B9)))
    halves = ((word >> T.uint64(shift)) & T.uint64(0xFFFF) for word in (first, second) for shift in (0, 16))
    return sum((T.Cast("float32", half) for half in halves), T.float32(0)) * T.float32(2**-16) - T.float32(2)


def _mix(word: Any) -> Any:
    """The finaliser of MurmurHash3 (Appleby 2011): every bit of the word decides over every bit of the result."""
    word = _word((word ^ (word >> T.uint64(16))) * T.uint64(0x85EBCA6B))
    word = _word((word ^ (word >> T.uint64(13))) * T.uint64(0xC2B2AE35))
    return word ^ (word >> T.uint64(16))


def _word(value: Any) -> Any:
    """32 bits, kept in 64: TVM's simplifier takes it that a uint32 does not wrap around."""
    return value & T.uint64(0xFFFFFFFF)
