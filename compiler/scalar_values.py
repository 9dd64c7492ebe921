"""What a tensor that depends on no data holds at an index: constants, aranges, comparisons, triangles, selections.

Attention masks are such tensors. As a scalar expression in the positions of query i and key j a mask can be proven to
be causal, or a sliding window, in whatever way it was written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, tirx

from tilewright.compiler.relax_utils import Expr, Scope, dtype, op_name, scalar, substitute
from tilewright.compiler.views import Analyzer, Index, broadcast_index, peel

HIDDEN = -1e9  # a score this low has no weight in any softmax over float32 scores
_FLOAT_LIMIT = 1e30  # infinities and finfo.min stand as this: sums of a few stay finite
_FAR = 1 << 30  # more than any distance between two tokens


def scalar_at(scope: Scope, expr: Expr, index: Index, analyzer: Analyzer) -> Expr | None:
    """Element `index` of `expr` as a scalar expression (bool, int64 or float32); None if it depends on data."""
    expr, index = peel(scope, expr, index, analyzer)
    value = scope.value(expr)
    number = scalar(value)
    if number is not None:
        return _constant(number, dtype(value))
    name = op_name(value)
    rule = _RULES.get(name or "")
    if rule is not None:
        return rule(scope, value, index, analyzer)
    if name not in _ARITHMETIC:
        return None
    args = [scalar_at(scope, a, broadcast_index(a, index), analyzer) for a in value.args]
    return None if any(a is None for a in args) else _ARITHMETIC[name](*args)


def _kind(dtype_name: str) -> str:
    if "bool" in dtype_name:
        return "bool"
    return "float32" if "float" in dtype_name else "int64"


def _constant(number: Any, dtype_name: str) -> Expr:
    kind = _kind(dtype_name)
    if kind == "float32":
        return tirx.const(max(min(float(number), _FLOAT_LIMIT), -_FLOAT_LIMIT), kind)
    return tirx.const(bool(number) if kind == "bool" else int(number), kind)


def _arange(scope: Scope, value: Expr, index: Index, analyzer: Analyzer) -> Expr:
    return value.args[0] + index[0] * value.args[2]


def _filled(number: float) -> Callable[..., Expr]:
    return lambda scope, value, index, analyzer: _constant(number, dtype(value))


def _full(scope: Scope, value: Expr, index: Index, analyzer: Analyzer) -> Expr | None:
    return scalar_at(scope, value.args[1], [], analyzer)


def _triangle(scope: Scope, value: Expr, index: Index, analyzer: Analyzer) -> Expr | None:
    inside = scalar_at(scope, value.args[0], index, analyzer)
    if inside is None:
        return None
    distance, k = index[-1] - index[-2], value.args[1]
    keep = distance <= k if op_name(value) == "tril" else distance >= k
    return tirx.Select(keep, inside, tirx.const(0, inside.ty.dtype))


def _astype(scope: Scope, value: Expr, index: Index, analyzer: Analyzer) -> Expr | None:
    inside = scalar_at(scope, value.args[0], index, analyzer)
    if inside is None:
        return None
    kind, source = _kind(dtype(value)), str(inside.ty.dtype)
    if kind == source:
        return inside
    if source == "bool":
        return tirx.Select(inside, tirx.const(1, kind), tirx.const(0, kind))
    return inside != tirx.const(0, source) if kind == "bool" else inside.astype(kind)


_RULES: dict[str, Callable[[Scope, Expr, Index, Analyzer], Expr | None]] = {
    "arange": _arange,
    "ones": _filled(1),
    "zeros": _filled(0),
    "ones_like": _filled(1),
    "zeros_like": _filled(0),
    "full": _full,
    "full_like": _full,
    "tril": _triangle,
    "triu": _triangle,
    "astype": _astype,
}

_ARITHMETIC: dict[str | None, Callable[..., Expr]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "negative": lambda a: -a,
    "floor_divide": tirx.floordiv,
    "mod": tirx.floormod,
    "minimum": tirx.min,
    "maximum": tirx.max,
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "greater": lambda a, b: a > b,
    "greater_equal": lambda a, b: a >= b,
    "equal": lambda a, b: a.equal(b),
    "not_equal": lambda a, b: tirx.Not(a.equal(b)),
    "logical_and": tirx.all,
    "logical_or": tirx.any,
    "logical_not": tirx.Not,
    "where": tirx.Select,
}


@dataclass(frozen=True)
class Mask:
    """Which keys j a query i sees: all, those with j <= i (causal), those with j > i - window."""

    causal: bool = False
    window: int | None = None

    def __and__(self, other: "Mask") -> "Mask":
        windows = [w for w in (self.window, other.window) if w is not None]
        return Mask(self.causal or other.causal, min(windows, default=None))


def classify_mask(bias: Expr, query: Expr, key: Expr) -> Mask | None:
    """The mask that a score bias in `query` and `key` is: 0 where visible, HIDDEN or less elsewhere. None: another one.

    The distance e >= 0 of the two is put in place of one of them, so that both cancel; the analyzer then knows the
    bias's value over a range of distances, or there is no such value.
    """
    distance = tirx.Var("e", "int64")
    before = substitute(bias, {query: key + distance})  # the key is the query, or e tokens earlier
    after = substitute(bias, {key: query + 1 + distance})

    def state(expr: Expr, first: int, stop: int) -> str | None:
        analyzer = tvm.sym.Analyzer()
        for position in (query, key):
            analyzer.bind(position, ir.Range(0, _FAR))
        analyzer.bind(distance, ir.Range(first, stop))
        value = analyzer.simplify(expr)
        if not isinstance(value, tirx.FloatImm):
            return None
        return "visible" if value.value == 0 else "hidden" if value.value <= HIDDEN else None

    ahead = state(after, 0, _FAR)
    if ahead is None:
        return None
    if state(before, 0, _FAR) == "visible":
        return Mask(causal=ahead == "hidden")
    for window in sorted({w + d for w in _integers(before) for d in (-1, 0, 1)}):
        if window > 0 and (state(before, 0, window), state(before, window, _FAR)) == ("visible", "hidden"):
            return Mask(ahead == "hidden", window)
    return None


def _integers(expr: Expr) -> set[int]:
    """The magnitudes of the integer constants of an expression."""
    found: set[int] = set()
    tvm_ffi.structural_walk(expr, (tirx.IntImm, lambda node: found.add(abs(int(node.value)))))
    return found
