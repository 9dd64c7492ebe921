"""Reference bodies of the composites of stage "fused", in plain Relax operators, made from the spec alone.

A body is what a composite means: the IR runs with it on any machine, and every kernel is compared with it. It says
nothing about speed. Extents that a spec leaves open (tokens, the heads of a norm) are symbolic, so that equal specs
share one function.
"""

from collections.abc import Callable
from typing import Any

from tvm import relax, tirx
from tvm.relax import op

from tilewright.compiler.composites import (
    AttentionSpec,
    EmbeddingSpec,
    GatedSpec,
    LinearSpec,
    NormSpec,
    RopeSpec,
    dump_spec,
)
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import Emit, Expr

FLOAT32 = "float32"
MASKED = -1e30  # exp of it is 0, and it stays finite in sums
GELU_TANH = (0.7978845608028654, 0.044715)  # sqrt(2 / pi), and the cubic term. Hendrycks and Gimpel 2016


def add_composite(builder: relax.BlockBuilder, name: str, spec: Any, rank: int = 2) -> Any:
    """The private function of a composite in the builder's module, added if no equal one is there.

    rank: of x, for rms_norm only. Returns its GlobalVar. Raises CompileError where the spec has no plain body.
    """
    key = {"tw.composite": name, "tw.spec": dump_spec(spec)}
    for gv, func in builder.get().functions.items():
        attrs = func.attrs or {}
        if all(attrs.get(k) == v for k, v in key.items()) and _rank(name, func) in (rank, None):
            return gv
    return builder.add_func(_function(name, spec, rank).with_attrs(key), name)


def _rank(name: str, func: Any) -> int | None:
    return int(func.params[0].ty.ndim) if name == "rms_norm" else None


def _function(name: str, spec: Any, rank: int) -> relax.Function:
    if name not in _BODIES:
        raise CompileError(f"composite {name} has no body in plain operators; there is one for: {', '.join(_BODIES)}")
    params, body = _BODIES[name](spec, rank)
    builder = relax.BlockBuilder()
    with builder.function(name, params, private=True):
        with builder.dataflow():
            output = builder.emit_output(body(builder.emit, *params))
        builder.emit_func_output(output)
    return builder.get()[name]


def _tensor(name: str, *extents: Any, dtype: str = FLOAT32) -> Any:
    return relax.Var(name, relax.TensorType(extents, dtype))


def cast(emit: Emit, x: Expr, dtype: str) -> Expr:
    """x in another dtype; itself where it has that one."""
    return x if str(x.ty.dtype) == dtype else emit(op.astype(x, dtype))


def in_float32(emit: Emit, spec: Any, body: Callable[..., Expr]) -> Callable[..., Expr]:
    """`body`, computed in float32 on arguments and with a result of the spec's dtype."""
    return lambda *args: cast(emit, body(*(cast(emit, a, FLOAT32) for a in args)), spec.dtype)


def _n() -> Any:
    return tirx.Var("n", "int64")


Body = tuple[list[Any], Callable[..., Expr]]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic, shared by the bodies and their tests


def attention(emit: Emit, spec: AttentionSpec, q: Expr, k: Expr, v: Expr, sinks: Expr | None = None) -> Expr:
    """q[n,H,D], k, v[n,G,D], sinks[H] -> [n,H,D]. Vaswani et al. 2017; grouped queries: Ainslie et al. 2023."""
    group, n = spec.heads // spec.kv_heads, q.ty.shape.values[0]
    keys, values = (emit(op.repeat(t, group, 1)) for t in (k, v))
    queries, values = (emit(op.permute_dims(t, [1, 0, 2])) for t in (q, values))
    scores = emit(op.matmul(queries, emit(op.permute_dims(keys, [1, 2, 0]))))
    scores = emit(op.multiply(scores, relax.const(spec.scale)))
    if spec.soft_cap is not None:
        scores = emit(op.tanh(emit(op.divide(scores, relax.const(spec.soft_cap)))))
        scores = emit(op.multiply(scores, relax.const(spec.soft_cap)))
    if spec.causal:
        scores = emit(op.where(causal_mask(emit, n, spec.window), scores, relax.const(MASKED)))
    weights = op.nn.softmax(scores, axis=-1) if sinks is None else _softmax_with(emit, scores, sinks)
    out = emit(op.matmul(emit(weights), values))
    return emit(op.permute_dims(out, [1, 0, 2]))


def _softmax_with(emit: Emit, scores: Expr, sinks: Expr) -> Expr:
    """Softmax of scores[H,n,n] over keys and a sink a head, which gets no column."""
    sink = emit(op.expand_dims(sinks, [1, 2]))
    peak = emit(op.maximum(emit(op.max(scores, axis=-1, keepdims=True)), sink))
    weights = emit(op.exp(emit(op.subtract(scores, peak))))
    rest = emit(op.exp(emit(op.subtract(sink, peak))))
    return op.divide(weights, emit(op.add(emit(op.sum(weights, axis=-1, keepdims=True)), rest)))


def causal_mask(emit: Emit, n: Expr, window: int | None) -> Expr:
    """bool[n,n]: query i (rows) sees key j where i - window < j <= i."""
    positions = emit(op.arange(0, n, 1, dtype="int64"))
    query, key = emit(op.expand_dims(positions, 1)), emit(op.expand_dims(positions, 0))
    mask = emit(op.less_equal(key, query))
    if window is not None:
        first = emit(op.subtract(query, relax.const(window, "int64")))
        mask = emit(op.logical_and(mask, emit(op.greater(key, first))))
    return mask


def rope(emit: Emit, x: Expr, cos: Expr, sin: Expr) -> Expr:
    """x[n,h,D], cos, sin[n,D/2] -> [n,h,D]: the pairs (i, i + D/2) rotated."""
    half = int(x.ty.shape.values[2]) // 2
    a, b = (emit(op.strided_slice(x, [2], [s], [s + half])) for s in (0, half))
    cos, sin = (emit(op.expand_dims(t, 1)) for t in (cos, sin))
    first = emit(op.subtract(emit(op.multiply(a, cos)), emit(op.multiply(b, sin))))
    second = emit(op.add(emit(op.multiply(b, cos)), emit(op.multiply(a, sin))))
    return emit(op.concat([first, second], axis=2))


def gated(emit: Emit, spec: GatedSpec, x: Expr) -> Expr:
    """x[n,2I] = gate, up side by side -> activation(gate) * up, [n,I]."""
    size = spec.features
    gate, up = (emit(op.strided_slice(x, [1], [s], [s + size])) for s in (0, size))
    return emit(op.multiply(activation(emit, spec.activation, gate), up))


def activation(emit: Emit, name: str, x: Expr) -> Expr:
    """silu: x * sigmoid(x); gelu_tanh: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    if name == "silu":
        return emit(op.nn.silu(x))
    if name == "gelu_tanh":
        return emit(op.nn.gelu_tanh(x))
    raise CompileError(f"activation {name!r} is unknown; known are silu and gelu_tanh")


def rms_norm(emit: Emit, spec: NormSpec, x: Expr, weight: Expr) -> Expr:
    return emit(op.nn.rms_norm(x, weight, axes=[-1], epsilon=spec.eps))


# ---------------------------------------------------------------------------------------------------------------------
# Bodies: spec -> parameters, and their result


def _attention(spec: AttentionSpec, rank: int) -> Body:
    n, heads, dim = _n(), (spec.heads, spec.kv_heads, spec.kv_heads), spec.head_dim
    params = [_tensor(name, n, h, dim) for name, h in zip("qkv", heads, strict=True)]
    params += [_tensor("sinks", spec.heads)] * spec.sinks
    return params, lambda emit, *args: attention(emit, spec, *args)


def _rope(spec: RopeSpec, rank: int) -> Body:
    n, half = _n(), spec.head_dim // 2
    params = [_tensor("x", n, spec.heads, spec.head_dim), _tensor("cos", n, half), _tensor("sin", n, half)]
    return params, rope


def _rms_norm(spec: NormSpec, rank: int) -> Body:
    extents = [tirx.Var(name, "int64") for name in ("n", "h")[: rank - 1]]
    params = [_tensor("x", *extents, spec.features, dtype=spec.dtype), _tensor("weight", spec.features)]
    return params, lambda emit, *args: in_float32(emit, spec, lambda x, w: rms_norm(emit, spec, x, w))(*args)


def _gated(spec: GatedSpec, rank: int) -> Body:
    x = _tensor("x", _n(), 2 * spec.features, dtype=spec.dtype)
    return [x], lambda emit, x: in_float32(emit, spec, lambda y: gated(emit, spec, y))(x)


def _linear(spec: LinearSpec, rank: int) -> Body:
    if spec.weight_format != "f32":
        raise CompileError(f"a linear on {spec.weight_format} weights has no body in plain operators; only f32 has")
    n, outs, ins = _n(), spec.out_features, spec.in_features
    x = _tensor("x", n, 2 * ins if spec.gated else ins)
    optional = {
        "norm_weight": (spec.norm is not None, (ins,)),
        "bias": (spec.bias, (outs,)),
        "residual": (spec.residual, (n, outs)),
    }
    params = [x, _tensor("weight", outs, ins)]
    params += [_tensor(name, *extents) for name, (present, extents) in optional.items() if present]
    names = [p.name for p in params]

    def body(emit: Emit, *args: Expr) -> Expr:
        arg = dict(zip(names, args, strict=True))
        y = arg["x"]
        if spec.norm is not None:
            y = rms_norm(emit, spec.norm, y, arg["norm_weight"])
        if spec.gated is not None:
            y = gated(emit, spec.gated, y)
        y = emit(op.matmul(y, emit(op.permute_dims(arg["weight"]))))
        for name in ("bias", "residual"):
            if name in arg:
                y = emit(op.add(y, arg[name]))
        return y

    return params, body


def _embedding(spec: EmbeddingSpec, rank: int) -> Body:
    if spec.weight_format != "f32":
        raise CompileError(f"an embedding of {spec.weight_format} weights has no body in plain operators; only f32 has")

    def body(emit: Emit, table: Expr, tokens: Expr) -> Expr:
        x = emit(op.take(table, tokens, axis=0, mode="clip"))  # the "fast" mode reads out of bounds
        return x if spec.scale == 1.0 else emit(op.multiply(x, relax.const(spec.scale)))

    return [_tensor("table", spec.vocab, spec.features), _tensor("tokens", _n(), dtype="int32")], body


_BODIES: dict[str, Callable[[Any, int], Body]] = {
    "attention": _attention,
    "rope": _rope,
    "rms_norm": _rms_norm,
    "gated": _gated,
    "linear": _linear,
    "embedding": _embedding,
}
