"""Root-mean-square norms, spelled out or as an operator, become one composite."""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from tilewright.compiler.bodies import add_composite
from tilewright.compiler.composites import NormSpec
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.products import factors
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Rule,
    Scope,
    integers,
    is_tensor,
    main_function,
    op_name,
    rebuild,
    same_shape,
    shape,
    shortest,
    static,
)
from tilewright.compiler.views import Analyzer, index_vars, peel, simplify_views


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Find x * rsqrt(mean(x^2, -1) + eps) * weight, its factors in any order, on [n,K] and on [n,h,D].

    before   m = mean(power(x, 2), axis=[-1], keepdims=True);  y = x * rsqrt(m + eps) * weight
    before   y = nn.rms_norm(x, weight, axes=[-1], epsilon=eps)
    after    y = rms_norm(x, weight)
    """

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        scope = Scope(func)
        rules: dict[Any, Rule] = {}
        for var, value in scope.definition.items():
            norm = _match_operator(value) or _match_product(scope, var)
            if norm is not None:
                rules[var] = _replacement(norm)
        return simplify_views(rebuild(mod, rules))


@dataclass(frozen=True)
class _Norm:
    x: Expr
    weight: Expr  # [K], or unit axes before K
    eps: float


def _replacement(norm: _Norm) -> Rule:
    def emit(emitter: Emitter) -> Expr:
        features = static(shape(norm.x)[-1]) or 0
        spec = NormSpec(features, shortest(norm.eps))
        function = add_composite(emitter.builder, "rms_norm", spec, rank=len(shape(norm.x)))
        weight = emitter.map(norm.weight)
        if len(shape(norm.weight)) > 1:
            weight = emitter(relax.op.reshape(weight, [features]))
        return relax.Call(function, [emitter.map(norm.x), weight])

    return emit


def _is_normal(x: Expr) -> bool:
    """[n,K] or [n,h,K] of a known K: what the composite takes."""
    return is_tensor(x) and len(shape(x)) in (2, 3) and static(shape(x)[-1]) is not None


def _match_operator(value: Expr) -> _Norm | None:
    if op_name(value) != "nn.rms_norm" or not _is_normal(value):
        return None
    rank = len(shape(value))
    if [a % rank for a in integers(value.attrs.axes)] != [rank - 1]:
        return None
    return _Norm(value.args[0], value.args[1], float(value.attrs.epsilon))


def _match_product(scope: Scope, var: Any) -> _Norm | None:
    """The three factors x, weight and the reciprocal root of x's mean square."""
    if not scope.is_op(var, "multiply") or not _is_normal(var):
        return None
    for root in factors(scope, var).tensors:
        found = _mean_square_root(scope, root)
        if found is None:
            continue
        x, eps = found
        product = factors(scope, var, whole=x)  # x may be a product: an embedding times a scale
        rest = [t for t in product.tensors if not t.same_as(root) and not scope.same(t, x)]
        if product.number == 1 and len(product.tensors) == 3 and len(rest) == 1:
            weight = rest[0]
            if _is_weight(weight, var) and _covers(x, var):
                return _Norm(x, weight, eps)
    return None


def _covers(x: Expr, var: Any) -> bool:
    return is_tensor(x) and same_shape(shape(x), shape(var))


def _is_weight(weight: Expr, var: Any) -> bool:
    """One number a feature, the same for all rows."""
    extents = [static(e) for e in shape(weight)] if is_tensor(weight) else []
    return bool(extents) and extents[-1] == static(shape(var)[-1]) and all(e == 1 for e in extents[:-1])


def _mean_square_root(scope: Scope, root: Expr) -> tuple[Expr, float] | None:
    """(x, eps) where `root` is (mean(x^2) + eps)^-1/2 over the last axis, which it keeps as 1."""
    inner = _reciprocal_root(scope, root)
    shifted = scope.without_number(inner, "add") if inner is not None else None
    if shifted is None or not is_tensor(root) or static(shape(root)[-1]) != 1:
        return None
    analyzer = Analyzer()
    rows = index_vars(shape(shifted[0])[:-1], analyzer)
    mean, index = peel(scope, shifted[0], [*rows, tirx.const(0, "int64")], analyzer)  # the kept axis may be a view
    value = scope.value(mean)
    in_order = all(a.same_as(b) for a, b in zip(index, rows, strict=False))
    if op_name(value) != "mean" or value.attrs.axis is None or not in_order:
        return None
    rank = len(shape(value.args[0]))
    if [a % rank for a in integers(value.attrs.axis)] != [rank - 1]:
        return None
    x = _square_of(scope, value.args[0])
    return None if x is None else (x, float(shifted[1]))


def _reciprocal_root(scope: Scope, expr: Expr) -> Expr | None:
    """x of rsqrt(x), of 1 / sqrt(x), of power(x, -0.5)."""
    value = scope.value(expr)
    if op_name(value) == "rsqrt":
        return value.args[0]
    if op_name(value) == "power" and scope.number(value.args[1]) == -0.5:
        return value.args[0]
    if op_name(value) == "divide" and scope.number(value.args[0]) == 1 and scope.is_op(value.args[1], "sqrt"):
        return scope.args(value.args[1])[0]
    return None


def _square_of(scope: Scope, expr: Expr) -> Expr | None:
    """x of square(x), of power(x, 2), of x * x."""
    value = scope.value(expr)
    if op_name(value) == "square" or (op_name(value) == "power" and scope.number(value.args[1]) == 2):
        return value.args[0]
    if op_name(value) == "multiply" and scope.same(value.args[0], value.args[1]):
        return value.args[0]
    return None
