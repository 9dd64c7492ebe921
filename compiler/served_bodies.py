"""Reference bodies of the served composites: pages, packed weights, sampling. What every kernel of theirs is held to.

`add_served_composite` puts one into a module: a private function with the attributes `tw.composite` and `tw.spec` and a
body made from the spec alone, plain TIR loops where operators can't say it well. Pages are updated in place and
threaded as a value: what appends takes the newest `pages` and returns the next, which its readers take.
"""

from collections.abc import Callable
from typing import Any

from tvm import ir, relax, tirx
from tvm.script import relax as R
from tvm.script import tirx as T

from tilewright.compiler.bodies import cast, gated, rms_norm, rope
from tilewright.compiler.composites import (
    SAMPLING_INPUTS,
    STEP_INPUTS,
    AnglesSpec,
    AppendSpec,
    EmbeddingSpec,
    KVFormat,
    LinearSpec,
    PagedAttentionSpec,
    QKVAppendSpec,
    SampleSpec,
    dump_spec,
)
from tilewright.compiler.packed_weights import dequantise_kernel, packed_dtype, packed_shape
from tilewright.compiler.relax_utils import Emit, Expr
from tilewright.compiler.sample_body import sample_kernel

op = relax.op

PAGED_ATTENTION_INPUTS = ("positions", "indptr", "page_indptr", "page_indices", "kv_len", "phases")


def add_served_composite(builder: relax.BlockBuilder, composite: str, spec: Any) -> ir.GlobalVar:
    """The private function of a composite of BODIES; an equal one that the module has already is shared.

    linear and embedding take packed weights here, so the module must not hold their plain forms as well.
    """
    text = dump_spec(spec)
    for gvar, func in builder.get().functions.items():
        attrs = func.attrs or {}
        if attrs.get("tw.composite") == composite and attrs.get("tw.spec") == text:
            return gvar
    params, body = BODIES[composite](builder, spec)
    own = relax.BlockBuilder()
    with own.function(composite, params, private=True):
        with own.dataflow():
            output = own.emit_output(body(own.emit))
        own.emit_func_output(output)
    func = own.get()[composite].with_attrs({"tw.composite": composite, "tw.spec": text})
    return builder.add_func(func, composite)


def tensor(name: str, shape: tuple[Any, ...], dtype: str = "float32") -> relax.Var:
    return relax.Var(name, R.Tensor(shape, dtype))


def input_vars(
    inputs: dict[str, tuple[str, str]], extents: dict[str, tirx.Var], names: tuple[str, ...] | None = None
) -> dict[str, relax.Var]:
    """Variables for entries of STEP_INPUTS or SAMPLING_INPUTS; `extents` holds sizes by name, and gets the new ones."""
    variables = {}
    for name in names or tuple(inputs):
        (extent, plus, more), dtype = inputs[name][0].partition("+"), inputs[name][1]
        size = extents.setdefault(extent, tirx.Var(extent, "int64"))
        variables[name] = tensor(name, (size + int(more) if plus else size,), dtype)
    return variables


def pages_var(kv: KVFormat) -> relax.Var:
    """pages[layers, num_pages, 2, kv_heads, page_size * head_dim], with a symbolic num_pages of its own."""
    shape = (kv.layers, tirx.Var("num_pages", "int64"), 2, kv.kv_heads, kv.page_size * kv.head_dim)
    return tensor("pages", shape, kv.dtype)


def _layer_var() -> relax.Var:
    return relax.Var("layer", R.Prim("int64"))


# ---------------------------------------------------------------------------------------------------------------------
# Pages

_Body = tuple[list[relax.Var], Callable[[Emit], Expr]]


def _kv_append(builder: relax.BlockBuilder, spec: AppendSpec) -> _Body:
    kv, t = spec.kv, tirx.Var("t", "int64")
    k, v = (tensor(name, (t, kv.kv_heads, kv.head_dim)) for name in "kv")
    pages, slots, layer = pages_var(kv), tensor("slots", (t,), "int32"), _layer_var()
    kernel = builder.add_func(append_kernel(kv), "append_tir")
    return [pages, k, v, slots, layer], lambda emit: _append(emit, kernel, pages, k, v, slots, layer)


def _append(emit: Emit, kernel: ir.GlobalVar, pages: Expr, *rest: Expr) -> Expr:
    return emit(op.call_tir_inplace(kernel, [pages, *rest], 0, pages.ty))


def append_kernel(kv: KVFormat) -> tirx.PrimFunc:
    """(pages, k f32[t,G,D], v f32[t,G,D], slots i32[t], layer): writes k and v into the pages' slots."""
    heads, dim, page_size, dtype = kv.kv_heads, kv.head_dim, kv.page_size, kv.dtype
    slot_stride, dim_stride = (1, page_size) if kv.k_transposed else (dim, 1)

    @T.prim_func(private=True, s_tir=True)
    def append(pages_handle: T.handle, k_handle: T.handle, v_handle: T.handle, slots_handle: T.handle, layer: T.int64):
        T.func_attr({"tirx.noalias": True})
        num_pages, t = T.int64(), T.int64()
        pages = T.match_buffer(pages_handle, (kv.layers, num_pages, 2, heads, page_size * dim), dtype)
        k = T.match_buffer(k_handle, (t, heads, dim), "float32")
        v = T.match_buffer(v_handle, (t, heads, dim), "float32")
        slots = T.match_buffer(slots_handle, (t,), "int32")
        for token, head, d in T.grid(t, heads, dim):
            with T.sblock("append"):
                i, h, e = T.axis.remap("SSS", [token, head, d])
                T.reads(slots[i], k[i, h, e], v[i, h, e])
                T.writes(pages[layer, 0:num_pages, 0:2, h, 0 : page_size * dim])
                if slots[i] >= 0:
                    pages[layer, slots[i] // page_size, 0, h, slots[i] % page_size * slot_stride + e * dim_stride] = (
                        T.Cast(dtype, k[i, h, e])
                    )
                    pages[layer, slots[i] // page_size, 1, h, slots[i] % page_size * dim + e] = T.Cast(
                        dtype, v[i, h, e]
                    )

    return append


def _paged_attention(builder: relax.BlockBuilder, spec: PagedAttentionSpec) -> _Body:
    attention = spec.attention
    extents: dict[str, tirx.Var] = {}
    inputs = input_vars(STEP_INPUTS, extents, PAGED_ATTENTION_INPUTS)
    shape = (extents["t"], attention.heads, attention.head_dim)
    q = tensor("q", shape, spec.dtype)
    sinks = [tensor("sinks", (attention.heads,))] * attention.sinks
    params = [q, pages_var(spec.kv), *inputs.values(), _layer_var(), *sinks]
    kernel = builder.add_func(paged_attention_kernel(spec), "attend_tir")

    def body(emit: Emit) -> Expr:
        args = [cast(emit, q, "float32"), *params[1:]]
        return cast(emit, emit(relax.call_tir(kernel, args, out_ty=R.Tensor(shape, "float32"))), spec.dtype)

    return params, body


def paged_attention_kernel(spec: PagedAttentionSpec) -> tirx.PrimFunc:
    """(q, pages, positions, indptr, page_indptr, page_indices, kv_len, phases, layer, out): softmax key by key. With
    sinks, f32[H], between layer and out."""
    attention, kv = spec.attention, spec.kv
    heads, kv_heads, dim, page_size = attention.heads, kv.kv_heads, kv.head_dim, kv.page_size
    group, dtype = heads // kv_heads, kv.dtype
    slot_stride, dim_stride = (1, page_size) if kv.k_transposed else (dim, 1)
    window = attention.window

    def first_key(position):
        return T.max(position - (window - 1), 0) if window else T.int32(0)

    def capped(score):
        cap = attention.soft_cap
        return score if cap is None else T.tanh(score / T.float32(cap)) * T.float32(cap)

    @T.prim_func(private=True, s_tir=True)
    def attend(
        q_handle: T.handle,
        pages_handle: T.handle,
        positions_handle: T.handle,
        indptr_handle: T.handle,
        page_indptr_handle: T.handle,
        page_indices_handle: T.handle,
        kv_len_handle: T.handle,
        phases_handle: T.handle,
        layer: T.int64,
        sinks_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        num_pages, t, b, p = T.int64(), T.int64(), T.int64(), T.int64()
        if attention.sinks:
            sinks = T.match_buffer(sinks_handle, (heads,), "float32")
        q = T.match_buffer(q_handle, (t, heads, dim), "float32")
        pages = T.match_buffer(pages_handle, (kv.layers, num_pages, 2, kv_heads, page_size * dim), dtype)
        positions = T.match_buffer(positions_handle, (t,), "int32")
        indptr = T.match_buffer(indptr_handle, (b + 1,), "int32")
        page_indptr = T.match_buffer(page_indptr_handle, (b + 1,), "int32")
        page_indices = T.match_buffer(page_indices_handle, (p,), "int32")
        kv_len = T.match_buffer(kv_len_handle, (b,), "int32")
        T.match_buffer(phases_handle, (b,), "int32")  # this body treats all tokens alike
        out = T.match_buffer(out_handle, (t, heads, dim), "float32")
        for sequence, head in T.grid(b, heads):
            with T.sblock("attend"):
                s, h = T.axis.remap("SS", [sequence, head])
                T.reads(
                    q[0:t, h, 0:dim],
                    pages[layer, 0:num_pages, 0:2, h // group, 0 : page_size * dim],
                    positions[0:t],
                    indptr[s : s + 2],
                    page_indptr[s],
                    page_indices[0:p],
                    kv_len[s],
                )
                T.writes(out[0:t, h, 0:dim])
                score = T.sblock_alloc_buffer((1,), "float32", scope="local")
                peak = T.sblock_alloc_buffer((1,), "float32", scope="local")  # the largest score so far
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")  # sum of exp(score - peak)
                page = T.sblock_alloc_buffer((1,), "int32", scope="local")
                # Loops start at 0: TVM's CanonicalizeLoop forgets to shift a variable in the bounds of inner loops.
                for query in T.serial(indptr[s + 1] - indptr[s]):
                    i = T.meta_var(indptr[s] + query)
                    first = T.meta_var(first_key(positions[i]))
                    peak[0] = sinks[h] if attention.sinks else T.float32(-3.0e38)
                    total[0] = T.float32(1 if attention.sinks else 0)
                    for d in T.serial(dim):
                        out[i, h, d] = T.float32(0)
                    for key in T.serial(T.min(positions[i] + 1, kv_len[s]) - first):
                        j = T.meta_var(first + key)
                        page[0] = page_indices[page_indptr[s] + j // page_size]
                        score[0] = T.float32(0)
                        for d in T.serial(dim):
                            score[0] = score[0] + q[i, h, d] * T.Cast(
                                "float32",
                                pages[layer, page[0], 0, h // group, j % page_size * slot_stride + d * dim_stride],
                            )
                        score[0] = capped(score[0] * T.float32(attention.scale))
                        if score[0] > peak[0]:
                            total[0] = total[0] * T.exp(peak[0] - score[0])
                            for d in T.serial(dim):
                                out[i, h, d] = out[i, h, d] * T.exp(peak[0] - score[0])
                            peak[0] = score[0]
                        total[0] = total[0] + T.exp(score[0] - peak[0])
                        for d in T.serial(dim):
                            out[i, h, d] = out[i, h, d] + T.exp(score[0] - peak[0]) * T.Cast(
                                "float32", pages[layer, page[0], 1, h // group, j % page_size * dim + d]
                            )
                    for d in T.serial(dim):
                        out[i, h, d] = out[i, h, d] / total[0]

    return attend if attention.sinks else _without(attend, "sinks_handle")


def _without(func: tirx.PrimFunc, name: str) -> tirx.PrimFunc:
    """The function without a parameter that it does not use."""
    return tirx.PrimFunc([p for p in func.params if p.name != name], func.body, func.ret_type, func.attrs)


def _qkv_append(builder: relax.BlockBuilder, spec: QKVAppendSpec) -> _Body:
    kv, norm, t = spec.kv, spec.norm, tirx.Var("t", "int64")
    heads, kv_heads, dim = spec.heads, kv.kv_heads, kv.head_dim
    qkv = tensor("qkv", (t, (heads + 2 * kv_heads) * dim), spec.dtype)
    cos, sin = (tensor(name, (t, dim // 2)) for name in ("cos", "sin"))
    norms = [tensor(name, (dim,)) for name in ("q_norm", "k_norm")] if norm else []
    pages, slots, layer = pages_var(kv), tensor("slots", (t,), "int32"), _layer_var()
    kernel = builder.add_func(append_kernel(kv), "append_tir")

    def body(emit: Emit) -> Expr:
        joint = emit(op.reshape(cast(emit, qkv, "float32"), (t, heads + 2 * kv_heads, dim)))
        split = emit(op.split(joint, [heads, heads + kv_heads], axis=1))
        q, k, v = (emit(relax.TupleGetItem(split, i)) for i in range(3))
        if norm:
            q, k = (rms_norm(emit, norm, x, w) for x, w in zip((q, k), norms, strict=True))
        q, k = (rope(emit, x, cos, sin) for x in (q, k))
        return relax.Tuple([cast(emit, q, spec.dtype), _append(emit, kernel, pages, k, v, slots, layer)])

    return [qkv, cos, sin, *norms, pages, slots, layer], body


def _angles(builder: relax.BlockBuilder, spec: AnglesSpec) -> _Body:
    t, half = tirx.Var("t", "int64"), spec.head_dim // 2
    positions, frequencies = tensor("positions", (t,), "int32"), tensor("frequencies", (half,))

    def body(emit: Emit) -> Expr:
        column = emit(op.reshape(cast(emit, positions, "float32"), (t, 1)))
        angles = emit(op.multiply(column, frequencies))
        return relax.Tuple([emit(op.cos(angles)), emit(op.sin(angles))])

    return [positions, frequencies], body


# ---------------------------------------------------------------------------------------------------------------------
# Packed weights


def _linear(builder: relax.BlockBuilder, spec: LinearSpec) -> _Body:
    n = tirx.Var("n", "int64")
    width = 2 * spec.in_features if spec.gated else spec.in_features
    outs = spec.result_features
    x = tensor("x", (n, width), spec.dtype)
    weight = _packed("weight", spec.weight_format, spec.out_features, spec.in_features)
    norm_weight = [tensor("norm_weight", (spec.in_features,))] if spec.norm else []
    bias = [tensor("bias", (spec.out_features,))] if spec.bias else []
    residual = [tensor("residual", (n, outs), spec.dtype)] if spec.residual else []
    dense = _dequantise(builder, weight, spec.weight_format, spec.out_features, spec.in_features)

    def body(emit: Emit) -> Expr:
        y: Expr = cast(emit, x, "float32")
        if spec.norm:
            y = cast(emit, rms_norm(emit, spec.norm, y, norm_weight[0]), spec.dtype)  # what is multiplied
            y = cast(emit, y, "float32")
        if spec.gated:
            y = gated(emit, spec.gated, y)
        y = emit(op.matmul(y, emit(op.permute_dims(dense(emit)))))
        for addend in bias:
            y = emit(op.add(y, addend))
        if spec.gate:
            y = gated(emit, spec.gate, y)
        for addend in residual:
            y = emit(op.add(y, cast(emit, addend, "float32")))
        return cast(emit, y, spec.out_dtype)

    return [x, weight, *norm_weight, *bias, *residual], body


def _embedding(builder: relax.BlockBuilder, spec: EmbeddingSpec) -> _Body:
    table = _packed("table", spec.weight_format, spec.vocab, spec.features)
    tokens = tensor("tokens", (tirx.Var("n", "int64"),), "int32")
    dense = _dequantise(builder, table, spec.weight_format, spec.vocab, spec.features)

    def body(emit: Emit) -> Expr:
        rows = emit(op.take(dense(emit), tokens, axis=0, mode="clip"))
        rows = rows if spec.scale == 1.0 else emit(op.multiply(rows, relax.const(spec.scale, "float32")))
        return cast(emit, rows, spec.dtype)

    return [table, tokens], body


def _packed(name: str, weight_format: str, rows: int, columns: int) -> relax.Var:
    return tensor(name, packed_shape(weight_format, rows, columns), packed_dtype(weight_format))


def _dequantise(
    builder: relax.BlockBuilder, weight: relax.Var, weight_format: str, rows: int, columns: int
) -> Callable[[Emit], Expr]:
    kernel = builder.add_func(dequantise_kernel(weight_format, rows, columns), "dequantise_tir")
    return lambda emit: emit(relax.call_tir(kernel, [weight], out_ty=R.Tensor((rows, columns), "float32")))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def _sample(builder: relax.BlockBuilder, spec: SampleSpec) -> _Body:
    extents: dict[str, tirx.Var] = {}
    inputs = input_vars(SAMPLING_INPUTS, extents)
    r = extents["r"]
    params = [tensor("logits", (r, spec.vocab)), *inputs.values()]
    kernel = builder.add_func(sample_kernel(spec), "sample_tir")
    outputs = [
        R.Tensor((r,), "int32"),
        R.Tensor((r,), "float32"),
        R.Tensor((r, spec.top_logprobs), "int32"),
        R.Tensor((r, spec.top_logprobs), "float32"),
    ]
    scratch = [R.Tensor((r, spec.vocab), "float32")] * 2

    def body(emit: Emit) -> Expr:
        results = emit(relax.call_tir(kernel, params, out_ty=[*outputs, *scratch]))
        return relax.Tuple([emit(relax.TupleGetItem(results, i)) for i in range(len(outputs))])

    return params, body


BODIES: dict[str, Callable[[relax.BlockBuilder, Any], _Body]] = {
    "kv_append": _kv_append,
    "paged_attention": _paged_attention,
    "angles": _angles,
    "qkv_append": _qkv_append,
    "linear": _linear,
    "embedding": _embedding,
    "sample": _sample,
}
