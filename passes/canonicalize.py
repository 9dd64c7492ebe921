"""One form for every source of graphs: `forward` over tokens[n], without batch axis, identities, or dead code."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import ir, relax, tirx

from tilewright.compiler.operators import ALONG_AXIS, ELEMENTWISE, NORMS, REDUCTIONS, TRIANGLES
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Rule,
    Scope,
    bindings,
    dtype,
    input_count,
    integers,
    is_tensor,
    main_function,
    op_name,
    operands,
    rebuild,
    scalar,
    shape,
    static,
    static_shape,
    symbolic_vars,
    weight_params,
)
from tilewright.compiler.views import simplify_views, slice_ranges


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring a hand-written or an imported graph to stage "model".

    before   main(tokens[1, s27], w):  x[1, s27, K] = ...;  y = x * 1.0;  z = astype(y, "float32");  return (z,)
    after    forward(tokens[n], w):    x[n, K] = ...;  return x

    A batch of one is dropped operator by operator; where one can't do without the axis it gets it back. Sets the
    attributes of a `forward`; an imported graph's `tw.params` takes the parameters' own names.
    """

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        mod = _name_tokens_n(mod)
        mod = _drop_identities(mod)
        mod = _Unbatched(mod).run()
        return simplify_views(mod)


def _name_tokens_n(mod: tvm.IRModule) -> tvm.IRModule:
    """forward over a symbolic length n, with the attributes of the stage."""
    gv, func = main_function(mod)
    symbols = {str(v.name): v for v in symbolic_vars(func.params[0].ty)}
    if len(symbols) == 1 and "n" not in symbols:
        func = func.bind_symbolic_vars({v: tirx.Var("n", "int64") for v in symbols.values()})
        mod = tvm.IRModule({**{g: f for g, f in mod.functions.items() if g != gv}, gv.name_hint: func})
    attrs: dict[str, Any] = {"tw.stage": "model", "num_input": input_count(func)}
    attrs |= dict.fromkeys(("tir_var_lower_bound", "tir_var_upper_bound"))  # by the symbol's old name
    if "tw.params" not in func.attrs:
        attrs["tw.params"] = json.dumps([_entry(p) for p in weight_params(func)])
    return rebuild(mod, {}, attrs=attrs, name="forward")


def _entry(param: Any) -> dict[str, Any]:
    return {"name": param.name, "sources": [param.name], "shape": static_shape(param), "format": "f32"}


# ---------------------------------------------------------------------------------------------------------------------
# Identities


def _drop_identities(mod: tvm.IRModule) -> tvm.IRModule:
    """Casts to the same dtype, factors of one, dropout outside of training: each becomes its operand.

    Infinities become the largest numbers.
    """
    scope = Scope(main_function(mod)[1])
    rules: dict[Any, Rule] = {}
    for var, value in scope.definition.items():
        operand = _identity_of(scope, value)
        if operand is not None:
            rules[var] = _renaming(operand)
        elif _is_infinite(value) or (isinstance(value, ir.Call) and any(map(_is_infinite, value.args))):
            rules[var] = _with_finite_constants(value)
    return rebuild(mod, rules)


def _renaming(operand: Expr) -> Rule:
    return lambda emit: emit.map(operand)


def _is_infinite(expr: Expr) -> bool:
    number = scalar(expr)
    return isinstance(number, float) and math.isinf(number)


def _finite(constant: Expr) -> Expr:
    """The largest float32 in place of infinity: to a softmax the same, and it can be printed, parsed and lowered."""
    return relax.const(math.copysign(np.finfo(np.float32).max, scalar(constant)), "float32")


def _with_finite_constants(value: Expr) -> Rule:
    def emit(emitter: Emitter) -> Expr:
        if _is_infinite(value):
            return _finite(value)
        args = [_finite(a) if _is_infinite(a) else emitter.map(a) for a in value.args]
        return relax.Call(value.op, args, value.attrs, value.ty_args)

    return emit


def _identity_of(scope: Scope, value: Expr) -> Expr | None:
    """The tensor that `value` equals bit for bit, where its operator does nothing."""
    name = op_name(value)
    if name == "astype" and dtype(value) == dtype(value.args[0]):
        return value.args[0]
    if name in ("multiply", "divide"):
        left, right = value.args
        for x, one in ((left, right), (right, left))[: 2 if name == "multiply" else 1]:
            if scope.number(one) == 1 and isinstance(x, relax.Var) and len(shape(x)) == len(shape(value)):
                return x
    if isinstance(value, relax.TupleGetItem) and value.index == 0 and scope.is_op(value.tuple_value, "nn.dropout"):
        return scope.args(value.tuple_value)[0]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# A batch of one


class _Unbatched:
    """Emits a function without the leading axis of extent 1 that its tokens have.

    Of every value that depends on the tokens either the value itself is kept ("whole"), or the value without its
    leading unit axis ("slim", the variables in `self.slim`). An operator without a rule gets whole operands, so the
    result is right whatever the operators are.
    """

    def __init__(self, mod: tvm.IRModule) -> None:
        self.mod = mod
        _, self.func = main_function(mod)
        self.slim: set[Any] = set()
        self.derived: set[Any] = {self.func.params[0]}  # depends on the tokens
        self.result = Scope(self.func).resolve(self.func.body.body)

    def run(self) -> tvm.IRModule:
        batched = _has_unit_batch(self.func.params[0])
        rules = {b.var: self._rule(b.var, b.value) for b in bindings(self.func)}
        return rebuild(self.mod, rules, params=self._params if batched else None)

    def _params(self, emit: Emitter, func: relax.Function) -> list[Any]:
        params = [relax.Var(p.name, p.ty) for p in func.params]
        params[0] = relax.Var("tokens", relax.TensorType(shape(func.params[0])[1:], dtype(func.params[0])))
        emit.new.update(zip(func.params, params, strict=True))
        self.slim.add(func.params[0])
        return params

    def _rule(self, var: Any, value: Expr) -> Rule:
        return lambda emit: self._emit(emit, var, value)

    def _emit(self, emit: Emitter, var: Any, value: Expr) -> Expr:
        if var.same_as(self.result) and isinstance(value, relax.Tuple):
            fields = [emit.map(f) for f in value.fields]  # slim ones stay so: a result has no batch axis
            return fields[0] if len(fields) == 1 else relax.Tuple(fields)
        if not any(x in self.derived for x in operands(value)):
            return emit.map(value)
        self.derived.add(var)
        slim = self._slim_form(emit, value)
        if slim is not None:
            self.slim.add(var)
            return slim
        return self._whole_form(emit, value)

    def _slim_form(self, emit: Emitter, value: Expr) -> Expr | None:
        """`value` without its leading unit axis, or None where that takes the operands as they are."""
        name = op_name(value)
        if isinstance(value, relax.TupleGetItem):
            return emit.map(value) if value.tuple_value in self.slim else None
        if isinstance(value, relax.Var):
            return emit.map(value) if value in self.slim else None
        if name in _RESHAPES:
            return relax.op.reshape(emit.map(value.args[0]), shape(value)[1:]) if _has_unit_batch(value) else None
        rule = _SLIM_RULES.get(name or "")
        if rule is None or not (name == "split" or _has_unit_batch(value)):
            return None
        return rule(self, emit, value)

    def _whole_form(self, emit: Emitter, value: Expr) -> Expr:
        name = op_name(value)
        if name in _RESHAPES:  # the elements' order is the same with and without the axis
            return relax.op.reshape(emit.map(value.args[0]), shape(value))
        if name == "take" and self._drops_batch(value):
            return emit.map(value.args[0])
        if isinstance(value, ir.Call):
            return relax.Call(value.op, [self.whole(emit, a) for a in value.args], value.attrs, value.ty_args)
        return self.whole(emit, value)

    def _drops_batch(self, take: Expr) -> bool:
        """x[0] of a slim x."""
        return (
            take.args[0] in self.slim and not take.attrs.axis and scalar(take.args[1]) == 0 and not shape(take.args[1])
        )

    def whole(self, emit: Emitter, expr: Expr) -> Expr:
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.whole(emit, f) for f in expr.fields])
        new = emit.map(expr)
        return emit(relax.op.expand_dims(new, 0)) if isinstance(expr, relax.Var) and expr in self.slim else new

    def thin(self, emit: Emitter, expr: Expr) -> Expr:
        """A tensor with a leading unit axis, without it."""
        new = emit.map(expr)
        return new if isinstance(expr, relax.Var) and expr in self.slim else emit(relax.op.squeeze(new, [0]))


_RESHAPES = frozenset(["reshape", "expand_dims", "squeeze", "flatten"])


def _has_unit_batch(expr: Expr) -> bool:
    return is_tensor(expr) and len(shape(expr)) > 1 and static(shape(expr)[0]) == 1


def _again(value: Expr, args: list[Expr]) -> Expr:
    return relax.Call(value.op, args, value.attrs, value.ty_args)


def _slim_elementwise(env: _Unbatched, emit: Emitter, value: Expr) -> Expr:
    """Operands of the result's rank lose the axis (it is 1 in each), those of a lower one never had it."""
    rank = len(shape(value))

    def operand(arg: Expr) -> Expr:
        if is_tensor(arg) and len(shape(arg)) == rank:
            return env.thin(emit, arg)
        return env.whole(emit, arg)

    return _again(value, [operand(a) for a in value.args])


def _slim_matmul(env: _Unbatched, emit: Emitter, value: Expr) -> Expr | None:
    return _slim_elementwise(env, emit, value) if len(shape(value)) > 2 else None


def _slim_first(env: _Unbatched, emit: Emitter, value: Expr) -> Expr:
    """Operators that treat the last axes only."""
    return _again(value, [env.thin(emit, value.args[0]), *value.args[1:]])


def _axes(value: Expr, axes: Any) -> list[int] | None:
    """Axes of the operand counted without the batch axis; None where that one is among them."""
    rank = len(shape(value.args[0]))
    given = range(rank) if axes is None else [axes] if isinstance(axes, int | tirx.IntImm) else axes
    found = [a % rank for a in integers(list(given))]
    return None if 0 in found else [a - 1 for a in found]


def _slim_reduction(env: _Unbatched, emit: Emitter, value: Expr) -> Expr | None:
    axes = _axes(value, value.attrs.axis)
    if axes is None:
        return None
    op = getattr(relax.op, op_name(value) or "")
    axis = axes[0] if op_name(value) in ("argmax", "argmin") else axes
    return op(env.thin(emit, value.args[0]), axis=axis, keepdims=bool(value.attrs.keepdims))


def _slim_along(env: _Unbatched, emit: Emitter, value: Expr) -> Expr | None:
    axes = _axes(value, value.attrs.axis)
    name = op_name(value) or ""
    if axes is None or name not in ("nn.softmax", "nn.log_softmax"):
        return None
    return getattr(relax.op.nn, name.removeprefix("nn."))(env.thin(emit, value.args[0]), axis=axes[0])


def _slim_norm(env: _Unbatched, emit: Emitter, value: Expr) -> Expr | None:
    axes = _axes(value, value.attrs.axes)
    if axes is None or op_name(value) != "nn.rms_norm":
        return None
    x = env.thin(emit, value.args[0])
    return relax.op.nn.rms_norm(x, emit.map(value.args[1]), axes=axes, epsilon=value.attrs.epsilon)


def _slim_permute(env: _Unbatched, emit: Emitter, value: Expr) -> Expr:
    axes = integers(value.attrs.axes) if value.attrs.axes is not None else list(range(len(shape(value))))[::-1]
    if axes[0] == 0:
        return relax.op.permute_dims(env.thin(emit, value.args[0]), [a - 1 for a in axes[1:]])
    x = emit(relax.op.permute_dims(env.whole(emit, value.args[0]), axes))
    return relax.op.squeeze(x, [0])


def _slim_broadcast(env: _Unbatched, emit: Emitter, value: Expr) -> Expr:
    source = value.args[0]
    equal_rank = len(shape(source)) == len(shape(value))
    x = env.thin(emit, source) if equal_rank else env.whole(emit, source)
    return relax.op.broadcast_to(x, shape(value)[1:])


def _slim_take(env: _Unbatched, emit: Emitter, value: Expr) -> Expr | None:
    source, indices = value.args
    axis = value.attrs.axis or 0
    if indices in env.slim and source not in env.derived and axis == 0:
        return relax.op.take(emit.map(source), emit.map(indices), axis=0, mode=value.attrs.mode)
    if axis > 0 and indices not in env.derived:
        return relax.op.take(env.thin(emit, source), emit.map(indices), axis=axis - 1, mode=value.attrs.mode)
    return None


def _slim_slice(env: _Unbatched, emit: Emitter, value: Expr) -> Expr | None:
    ranges = slice_ranges(value)
    if ranges is None or not _has_unit_batch(value.args[0]):
        return None
    x = env.thin(emit, value.args[0])
    kept = {a - 1: r for a, r in ranges.items() if a > 0}
    if not kept:
        return x
    begins, ends, steps = (list(column) for column in zip(*kept.values(), strict=True))
    return relax.op.strided_slice(x, list(kept), begins, ends, steps)


def _slim_repeat(env: _Unbatched, emit: Emitter, value: Expr) -> Expr | None:
    axes = _axes(value, value.attrs.axis)
    if value.attrs.axis is None or axes is None:
        return None
    return relax.op.repeat(env.thin(emit, value.args[0]), int(value.attrs.repeats), axes[0])


def _slim_concat(env: _Unbatched, emit: Emitter, value: Expr) -> Expr | None:
    axis = int(value.attrs.axis) % len(shape(value))
    fields = [env.thin(emit, f) for f in value.args[0].fields] if axis else []
    return relax.op.concat(fields, axis=axis - 1) if fields else None


def _slim_split(env: _Unbatched, emit: Emitter, value: Expr) -> Expr | None:
    axes = _axes(value, int(value.attrs.axis))
    if axes is None or not _has_unit_batch(value.args[0]):
        return None
    sections = value.attrs.indices_or_sections
    sections = int(sections) if isinstance(sections, int | tirx.IntImm) else integers(sections)
    return relax.op.split(env.thin(emit, value.args[0]), sections, axis=axes[0])


_SLIM_RULES: dict[str, Callable[[_Unbatched, Emitter, Expr], Expr | None]] = {
    **dict.fromkeys(ELEMENTWISE, _slim_elementwise),
    **dict.fromkeys(REDUCTIONS, _slim_reduction),
    **dict.fromkeys(ALONG_AXIS, _slim_along),
    **dict.fromkeys(NORMS, _slim_norm),
    **dict.fromkeys(TRIANGLES, _slim_first),
    "matmul": _slim_matmul,
    "permute_dims": _slim_permute,
    "broadcast_to": _slim_broadcast,
    "take": _slim_take,
    "strided_slice": _slim_slice,
    "repeat": _slim_repeat,
    "concat": _slim_concat,
    "split": _slim_split,
}
