"""The proof that nothing but attention mixes tokens: row i of every other value depends on token i alone.

A program with this property can be computed for any set of tokens at once, in chunks, and for the wanted rows only. The
proof gives every value its one token axis (or None: no tokens in it), binding by binding. An operator that is not known
to keep tokens apart is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tvm
from tvm import ir, relax

from tilewright.compiler.errors import CompileError
from tilewright.compiler.operators import ALONG_AXIS, BINARY, NORMS, REDUCTIONS, UNARY, VIEWS
from tilewright.compiler.relax_utils import (
    Expr,
    bindings,
    composite_of,
    input_count,
    integers,
    is_tensor,
    op_name,
    shape,
    static,
    symbolic_vars,
)
from tilewright.compiler.views import index_vars, push_view, slice_ranges

Axis: TypeAlias = Any  # int, None for no tokens, or a tuple of these for a tuple

# The token axis of each argument of a composite, where its result has tokens along axis 0; None: a weight.
COMPOSITES: dict[str, tuple[int | None, ...]] = {
    "attention": (0, 0, 0, None),
    "rope": (0, 0, 0),
    "rms_norm": (0, None),
    "gated": (0,),
    "linear": (0, None, None),
    "embedding": (None, 0),
}


class _Mixed(Exception):
    """Why an operator can't be proven to keep tokens apart."""


def token_axes(mod: tvm.IRModule, func: relax.Function) -> dict[Any, Axis]:
    """variable -> its token axis, for the parameters and bindings of a function of stage "fused".

    Raises CompileError, naming the binding and its operator, where a row may depend on another token.
    """
    return _Proof(mod, func).axes


class _Proof:
    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        self.mod = mod
        (self.length,) = symbolic_vars(func.params[0].ty)
        inputs = input_count(func)
        self.axes: dict[Any, Axis] = {p: 0 if k < inputs else None for k, p in enumerate(func.params)}
        for binding in bindings(func):
            try:
                axis = self.of_value(binding.value)
                self.check_type(binding.var, axis)
            except _Mixed as reason:
                what = self.describe(binding.value)
                raise CompileError(
                    f"{what} ({binding.var.name}) {reason}: only attention may mix tokens in a program that is served "
                    "step by step; write it per token"
                ) from None
            self.axes[binding.var] = axis

    def describe(self, value: Expr) -> str:
        composite = composite_of(self.mod, value)
        return f"operator {op_name(value) or (composite[0] if composite else type(value).__name__)}"

    def of(self, expr: Expr) -> Axis:
        """The token axis of an argument."""
        if isinstance(expr, relax.Var):
            return self.axes.get(expr)
        return tuple(self.of(f) for f in expr.fields) if isinstance(expr, relax.Tuple) else None

    def of_value(self, value: Expr) -> Axis:
        if isinstance(value, relax.Var | relax.Tuple):
            return self.of(value)
        if isinstance(value, ir.GenericConst):
            return None
        if isinstance(value, relax.TupleGetItem):
            return self.of(value.tuple_value)[value.index]
        if composite_of(self.mod, value) is not None:
            return self.of_composite(value)
        rule = _RULES.get(op_name(value) or "")
        if rule is None:
            raise _Mixed("is not known to keep tokens apart")
        if op_name(value) not in _LENGTHS and any(self.has_length(a) for a in value.args if ir.is_prim_expr(a)):
            raise _Mixed("uses the number of tokens as a value")
        return rule(self, value, [self.of(a) for a in value.args])

    def of_composite(self, call: Expr) -> Axis:
        name, spec = composite_of(self.mod, call)  # type: ignore[misc]
        axes = [self.of(a) for a in call.args]
        if name == "attention" and not spec.causal:
            raise _Mixed("sees later tokens, which a step does not have yet")
        if name not in COMPOSITES:
            raise _Mixed("is not known to keep tokens apart")
        if all(a is None for a in axes) and name != "attention":
            return None
        if axes != list(COMPOSITES[name][: len(axes)]):
            raise _Mixed(f"has tokens along axes {axes} of its arguments, not {list(COMPOSITES[name])}")
        return 0

    def has_length(self, extent: Expr) -> bool:
        return static(extent) is None and any(v.same_as(self.length) for v in symbolic_vars(extent))

    def length_axes(self, extents: Sequence[Expr]) -> list[int]:
        return [k for k, e in enumerate(extents) if self.has_length(e)]

    def check_type(self, var: Expr, axis: Axis) -> None:
        """The axes whose extent has the number of tokens in it are the token axis, and that one is it exactly."""
        if not is_tensor(var):
            return
        found = self.length_axes(shape(var))
        if found != ([] if axis is None else [axis]) or any(not shape(var)[k].same_as(self.length) for k in found):
            raise _Mixed(f"gives {var.ty}, whose token axis is not plain")


# ---------------------------------------------------------------------------------------------------------------------
# One rule an operator: (proof, call, token axes of the arguments) -> token axis of the result


def _rank(expr: Expr) -> int:
    return len(shape(expr))


def _one(axes: set[int], why: str) -> int | None:
    if len(axes) > 1:
        raise _Mixed(why)
    return axes.pop() if axes else None


def _axis_list(axis: Expr, rank: int) -> list[int]:
    """An attribute `axis`: None (all), a number or several."""
    if axis is None:
        return list(range(rank))
    return [a % rank for a in ([axis] if isinstance(axis, int) else integers(axis))]


def _unary(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    return axes[0]


def _broadcast(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    rank = max(_rank(a) for a in call.args)
    aligned = {axis + rank - _rank(a) for axis, a in zip(axes, call.args, strict=True) if axis is not None}
    return _one(aligned, "meets tokens along one axis with tokens along another")


def _matmul(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    (left, right), (left_rank, right_rank), rank = axes, map(_rank, call.args), _rank(call)
    if left == left_rank - 1 or right == max(right_rank - 2, 0):
        raise _Mixed("sums over tokens")
    found = {a + rank - r for a, r in ((left, left_rank), (right, right_rank)) if a is not None}
    return _one(found, "multiplies every token with every token")


def _arange(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    start, end, step = call.args
    if not any(proof.has_length(a) for a in (start, end, step)):
        return None
    if static(start) != 0 or static(step) != 1 or not end.same_as(proof.length):
        raise _Mixed("counts tokens otherwise than 0, 1 .. n - 1, their positions")
    return 0


def _filled(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    return _one(set(proof.length_axes(shape(call))), "has two token axes")


def _view(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    """Follow one index: element [.., i, ..] of the result must come from token i of the source."""
    if axes[0] is None:
        return _view_of_constant(proof, call)
    if op_name(call) == "strided_slice":
        ranges = slice_ranges(call)
        if ranges is None or axes[0] in ranges:
            raise _Mixed("picks among tokens")
    analyzer = tvm.sym.Analyzer()
    index = index_vars(shape(call), analyzer)
    source = push_view(call, index, analyzer)
    found = [k for k, x in enumerate(index) if source is not None and source[1][axes[0]].same_as(x)]
    if len(found) != 1:
        raise _Mixed("moves data from token to token")
    others = [x for k, x in enumerate(source[1]) if k != axes[0] and static(x) is None]  # type: ignore[index]
    if any(v.same_as(index[found[0]]) for x in others for v in symbolic_vars(x)):
        raise _Mixed("moves data from token to token")
    return found[0]


def _view_of_constant(proof: _Proof, call: Expr) -> Axis:
    found = proof.length_axes(shape(call))
    if found and op_name(call) != "broadcast_to":
        raise _Mixed("spreads a value that has no tokens over them")
    return _one(set(found), "has two token axes")


def _take(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    source, index = axes
    rank = _rank(call.args[1])
    axis = static(call.attrs.axis) or 0
    if source is not None and (index is not None or source == axis):
        raise _Mixed("picks among tokens")
    if index is not None:
        return axis + index
    return source if source is None or source < axis else source - 1 + rank


def _concat(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    fields = axes[0]
    if len(set(fields)) > 1:
        raise _Mixed("joins values with tokens to values without")
    if fields[0] is not None and fields[0] == static(call.attrs.axis) % len(shape(call)):  # type: ignore[operator]
        raise _Mixed("joins values along the tokens")
    return fields[0]


def _split(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    if axes[0] == static(call.attrs.axis) % _rank(call.args[0]):  # type: ignore[operator]
        raise _Mixed("picks among tokens")
    return (axes[0],) * len(call.ty.fields)


def _along(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    if axes[0] is not None and axes[0] in _axis_list(call.attrs.axis, _rank(call.args[0])):
        raise _Mixed("runs over the tokens")
    return axes[0]


def _norm(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    if axes[0] in _axis_list(call.attrs.axes, _rank(call.args[0])):
        raise _Mixed("normalises over the tokens")
    if any(a is not None for a in axes[1:]):
        raise _Mixed("has a weight that depends on tokens")
    return axes[0]


def _reduce(proof: _Proof, call: Expr, axes: list[Axis]) -> Axis:
    reduced = _axis_list(call.attrs.axis, _rank(call.args[0]))
    if axes[0] is None:
        return None
    if axes[0] in reduced:
        raise _Mixed("reduces over the tokens")
    return axes[0] if call.attrs.keepdims else axes[0] - sum(a < axes[0] for a in reduced)


_Rule: TypeAlias = Callable[[_Proof, Expr, list[Axis]], Axis]
_LENGTHS = frozenset(["arange", "full", "ones", "zeros"])  # may name the number of tokens in their arguments

_RULES: dict[str, _Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BINARY, _broadcast),
    **dict.fromkeys(VIEWS - {"take"}, _view),
    **dict.fromkeys(ALONG_AXIS, _along),
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("full", "ones", "zeros"), _filled),
    **dict.fromkeys(("full_like", "ones_like", "zeros_like"), _unary),
    "arange": _arange,
    "concat": _concat,
    "matmul": _matmul,
    "split": _split,
    "take": _take,
}
