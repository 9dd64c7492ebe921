"""activation(gate) * up becomes one composite on gate and up side by side."""

import math
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from tilewright.compiler.bodies import GELU_TANH, add_composite
from tilewright.compiler.composites import GatedSpec
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.products import factors
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Rule,
    Scope,
    is_tensor,
    main_function,
    rebuild,
    same_shape,
    shape,
    static,
)
from tilewright.compiler.views import simplify_views


@dataclass(frozen=True)
class FuseGatedMlp(Pass):
    """Find silu and tanh-GELU gates, as operators or spelled out, factors in any order.

    before   y = nn.silu(gate) * up
    before   y = gate * sigmoid(gate) * up
    before   y = 0.5 * gate * (1 + tanh(0.79788 * (gate + 0.044715 * gate^3))) * up
    after    y = gated(concat([gate, up], axis=1))

    The concat vanishes where gate and up are parts of one tensor, as after combine_projections.
    """

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        scope = Scope(func)
        rules: dict[Any, Rule] = {}
        for var in scope.definition:
            gate = _match(scope, var) if scope.is_op(var, "multiply") and _is_rows(var) else None
            if gate is not None:
                rules[var] = _replacement(gate)
        return simplify_views(rebuild(mod, rules))


@dataclass(frozen=True)
class _Gate:
    gate: Expr
    up: Expr
    activation: str


def _replacement(found: _Gate) -> Rule:
    def emit(emitter: Emitter) -> Expr:
        spec = GatedSpec(static(shape(found.gate)[1]) or 0, found.activation)
        function = add_composite(emitter.builder, "gated", spec)
        both = emitter(relax.op.concat([emitter.map(found.gate), emitter.map(found.up)], axis=1))
        return relax.Call(function, [both])

    return emit


def _is_rows(var: Any) -> bool:
    return is_tensor(var) and len(shape(var)) == 2 and static(shape(var)[1]) is not None


def _match(scope: Scope, var: Any) -> _Gate | None:
    """activation(gate) and up, or activation's own factors and up."""
    product = factors(scope, var)
    if len(product.tensors) not in (2, 3) or not all(
        is_tensor(t) and same_shape(shape(t), shape(var)) for t in product.tensors
    ):
        return None
    for k, up in enumerate(product.tensors):
        rest = [*product.tensors[:k], *product.tensors[k + 1 :]]
        found = _activation(scope, product.number, rest)
        if found is not None:
            return _Gate(found[0], up, found[1])
    return None


def _activation(scope: Scope, number: float, tensors: list[Expr]) -> tuple[Expr, str] | None:
    """(x, name) where number * the tensors' product is an activation of x."""
    if len(tensors) == 1 and number == 1:
        for op, name in (("nn.silu", "silu"), ("nn.gelu_tanh", "gelu_tanh")):
            if scope.is_op(tensors[0], op):
                return scope.args(tensors[0])[0], name
        return None
    for x, other in (tensors, tensors[::-1]) if len(tensors) == 2 else ():
        if number == 1 and scope.is_op(other, "sigmoid") and scope.same(scope.args(other)[0], x):
            return x, "silu"
        if number == 0.5 and _is_tanh_gate(scope, other, x):
            return x, "gelu_tanh"
    return None


def _is_tanh_gate(scope: Scope, expr: Expr, x: Expr) -> bool:
    """1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))"""
    shifted = scope.without_number(expr, "add")
    if shifted is None or shifted[1] != 1 or not scope.is_op(shifted[0], "tanh"):
        return False
    root, cubic = GELU_TANH
    inner = factors(scope, scope.args(shifted[0])[0])
    if len(inner.tensors) != 1 or not _close(inner.number, root) or not scope.is_op(inner.tensors[0], "add"):
        return False
    terms = [factors(scope, a) for a in scope.args(inner.tensors[0])]
    linear, third = sorted(terms, key=lambda t: t.number, reverse=True)
    is_linear = linear.number == 1 and len(linear.tensors) == 1 and scope.same(linear.tensors[0], x)
    return is_linear and _close(third.number, cubic) and _is_cube(scope, third.tensors, x)


def _is_cube(scope: Scope, tensors: tuple[Expr, ...], x: Expr) -> bool:
    if len(tensors) == 1 and scope.is_op(tensors[0], "power"):
        base, exponent = scope.args(tensors[0])
        return scope.number(exponent) == 3 and scope.same(base, x)
    return len(tensors) == 3 and all(scope.same(t, x) for t in tensors)


def _close(a: float, b: float) -> bool:
    """Equal constants, up to their rounding to float32."""
    return math.isclose(a, b, rel_tol=1e-6)
