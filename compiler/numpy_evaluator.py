"""A plain model evaluated by numpy: the reference that needs no compiler, for models of any size.

Takes the operators that the families in models/ are written in. Matrix products run in numpy's BLAS, which is fast
enough for the real weights; everything is float32, as the model says.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import ir, relax, tirx

from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import bindings, main_function, op_name


def evaluate(mod: Any, tokens: Sequence[int], param: Callable[[str], np.ndarray]) -> Any:
    """The result of a "model" stage module for int32[n] tokens: an array, or a list of arrays where it returns several.

    param: the float32 weight of a parameter's Relax name, read when needed and not kept. Raises CompileError for an
    operator that is not known here.
    """
    _, func = main_function(mod)
    length = func.params[0].ty.shape.values[0]
    names = {p: p.name for p in func.params[1:]}
    values: dict[Any, Any] = {func.params[0]: np.asarray(tokens, np.int32)}
    uses = _uses(func)

    def value(expr: Any) -> Any:
        if expr in values:
            return values[expr]
        if expr in names:
            return param(names[expr])
        if isinstance(expr, ir.GenericConst):
            return expr.value.numpy()
        if isinstance(expr, relax.Tuple):
            return [value(f) for f in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return value(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.ShapeExpr):
            return [_extent(v, length, len(tokens)) for v in expr.values]
        if ir.is_prim_expr(expr):
            return _extent(expr, length, len(tokens))
        return call(expr)

    def call(expr: Any) -> Any:
        name = op_name(expr)
        if name is None or name not in _OPERATORS:
            raise CompileError(
                f"the numpy reference lacks operator {name or type(expr).__name__}; add it to {__name__}"
            )
        return _OPERATORS[name](expr.attrs, *(value(a) for a in expr.args))

    with np.errstate(over="ignore"):
        for binding in bindings(func):
            values[binding.var] = value(binding.value)
            for used in uses[binding.var]:  # what no later binding reads is let go
                values.pop(used, None)
    return value(func.body.body)


def _uses(func: Any) -> dict[Any, list[Any]]:
    """For each binding's variable, the variables that it is the last to read."""
    last: dict[Any, Any] = {}
    order = bindings(func)
    for binding in order:
        for used in relax.analysis.free_vars(binding.value):
            last[used] = binding.var
    kept = set(relax.analysis.free_vars(func.body.body))
    ends: dict[Any, list[Any]] = {b.var: [] for b in order}
    for used, var in last.items():
        if used not in kept:
            ends[var].append(used)
    return ends


def _extent(expr: Any, length: Any, count: int) -> int:
    """A size with the length of the sequence put in."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, tirx.IntImm):
        return int(expr.value)
    if expr.same_as(length):
        return count
    raise CompileError(f"the numpy reference can't evaluate the size {expr}")


def _axes(axis: Any, rank: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(rank))
    axes = [axis] if isinstance(axis, int | tirx.IntImm) else list(axis)
    return tuple(int(a) % rank for a in axes)


def _where(attrs: Any, condition: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(condition, x, y)


def _take(attrs: Any, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.take(x, indices, axis=int(attrs.axis) if attrs.axis is not None else 0)


def _strided_slice(attrs: Any, x: np.ndarray, axes: Any, begin: Any, end: Any, strides: Any = None) -> np.ndarray:
    index = [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        index[axis] = slice(begin[i], min(end[i], x.shape[axis]), strides[i] if strides else 1)
    return x[tuple(index)]


def _softmax(attrs: Any, x: np.ndarray) -> np.ndarray:
    axis = int(attrs.axis)
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _expand_dims(attrs: Any, x: np.ndarray) -> np.ndarray:
    return np.expand_dims(x, tuple(int(a) for a in attrs.axis))


def _gelu_tanh(attrs: Any, x: np.ndarray) -> np.ndarray:
    c = np.float32(math.sqrt(2 / math.pi))
    return np.float32(0.5) * x * (1 + np.tanh(c * (x + np.float32(0.044715) * x * x * x)))


def _permute(attrs: Any, x: np.ndarray) -> np.ndarray:
    return np.transpose(x, None if attrs.axes is None else [int(a) for a in attrs.axes])


_OPERATORS: Mapping[str, Callable[..., np.ndarray]] = {
    "add": lambda _, a, b: a + b,
    "subtract": lambda _, a, b: a - b,
    "multiply": lambda _, a, b: a * b,
    "divide": lambda _, a, b: a / b,
    "less": lambda _, a, b: a < b,
    "less_equal": lambda _, a, b: a <= b,
    "logical_and": lambda _, a, b: a & b,
    "where": _where,
    "cos": lambda _, x: np.cos(x),
    "sin": lambda _, x: np.sin(x),
    "rsqrt": lambda _, x: 1 / np.sqrt(x),
    "tanh": lambda _, x: np.tanh(x),
    "nn.silu": lambda _, x: x / (1 + np.exp(-x)),
    "nn.gelu_tanh": _gelu_tanh,
    "nn.softmax": _softmax,
    "astype": lambda attrs, x: x.astype(str(attrs.dtype)),
    "arange": lambda attrs, start, end, step: np.arange(start, end, step, dtype=str(attrs.dtype)),
    "matmul": lambda _, a, b: a @ b,
    "mean": lambda attrs, x: x.mean(_axes(attrs.axis, x.ndim), keepdims=bool(attrs.keepdims), dtype=x.dtype),
    "take": _take,
    "permute_dims": _permute,
    "expand_dims": _expand_dims,
    "reshape": lambda _, x, shape: x.reshape(shape),
    "repeat": lambda attrs, x: np.repeat(x, int(attrs.repeats), int(attrs.axis)),
    "concat": lambda attrs, parts: np.concatenate(parts, int(attrs.axis)),
    "strided_slice": _strided_slice,
}
