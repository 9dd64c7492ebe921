"""Rows of a table of 16-bit floats: table[tokens] * scale, table[V, K], tokens i32[m] -> [m, K], dtype of the spec."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tilewright.compiler.composites import EmbeddingSpec
from tilewright.compiler.packed_weights import ROWS
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule, deferred
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.rows import BYTES, Vector, VectorTile, refuse_dtype

TABLE, TOKENS = 0, 1  # indices of the composite's arguments


@dataclass(frozen=True)
class EmbeddingFacts:
    spec: EmbeddingSpec


class Embedding(Schedule):
    name = "embedding"
    composite = "embedding"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> EmbeddingFacts | Reject:
        if call.spec.weight_format not in ROWS:
            return Reject(f"a table in {call.spec.weight_format} is none of {', '.join(ROWS)}")
        return refuse_dtype(call.spec.dtype) or EmbeddingFacts(call.spec)

    def space(self, facts: EmbeddingFacts, target: Target) -> Sequence[VectorTile]:
        return VectorTile(128), VectorTile(256)

    def floor(self, facts: EmbeddingFacts, target: Target) -> Floor:
        features = facts.spec.features
        row_bytes = 4 + features * (2 + BYTES[facts.spec.dtype])
        return Floor(0, bytes_per_row=row_bytes, flops_per_row=features * (facts.spec.scale != 1.0))

    def apply(self, facts: EmbeddingFacts, tile: VectorTile, target: Target) -> Lowering:
        spec = facts.spec
        out = Output("y", ("m", spec.features), spec.dtype)
        func = embedding_kernel(spec, tile, target)
        return Lowering((KernelCall(func, (TABLE, TOKENS), (out,)),), ("y",))


@deferred
def embedding_kernel(spec: EmbeddingSpec, tile: VectorTile, target: Target) -> Any:
    """(table[V,K] of the format's dtype, tokens i32[m], y[m,K] of spec.dtype); a token outside the table is clipped."""
    features, dtype = spec.features, ROWS[spec.weight_format]
    source, result = Vector.widest([dtype, spec.dtype], features)
    width = source.width
    vectors = features // width
    pdl = target.has("pdl")

    def scaled(row: Any) -> list[Any]:
        values = source.values(row)
        return values if spec.scale == 1.0 else [value * T.float32(spec.scale) for value in values]

    @T.prim_func
    def kernel(table_ptr: T.handle, tokens_ptr: T.handle, y_ptr: T.handle):
        T.func_attr({"global_symbol": "embedding"})
        m = T.int32()
        table = T.match_buffer(table_ptr, (spec.vocab, features), dtype)
        tokens = T.match_buffer(tokens_ptr, (m,), "int32")
        y = T.match_buffer(y_ptr, (m, features), spec.dtype)
        T.device_entry()
        block = T.cta_id([(m * vectors + (tile.threads - 1)) // tile.threads])
        thread = T.thread_id([tile.threads])
        at: T.let = block * tile.threads + thread
        row: T.let = T.truncdiv(at, vectors)
        column: T.let = T.truncmod(at, vectors) * width
        token = T.alloc_local([1], "int32")
        values = source.registers()
        rounded = result.registers()
        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
            T.ptx["griddepcontrol.wait"]()
        if row < m:
            T.ptx["ld.global.b32"](token[0], tokens.ptr_to([row]))
            token[0] = T.max(T.min(token[0], spec.vocab - 1), 0)
            # In 64 bits: a table may have more than 2^31 values.
            source.load(values, table.ptr_to([T.cast(token[0], "int64"), column]))
            result.round(rounded, scaled(values))
            result.store(y.ptr_to([row, column]), rounded)

    return chained(kernel, target)
