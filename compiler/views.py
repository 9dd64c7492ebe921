"""Index maps of view operators: which element of the source is element `index` of the view?

Passes match computations by these maps and not by syntax. An index is a list of scalar expressions, one an axis. Pushed
back through a chain of transposes, reshapes, broadcasts and slices it says where every element comes from, and the
analyzer proves two spellings equal: a head repeated for grouped queries is `head // group` in each of them.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import tvm
from tvm import relax, tirx

from tilewright.compiler.relax_utils import (
    Expr,
    Rule,
    Scope,
    integers,
    main_function,
    op_name,
    rebuild,
    same_extent,
    same_shape,
    scalar,
    shape,
    static,
)

Index: TypeAlias = list[Expr]
Analyzer: TypeAlias = tvm.sym.Analyzer

_ZERO = tirx.const(0, "int64")
_END = 1 << 62  # slices to "the end" are exported with the largest int64


def index_vars(extents: list[Expr], analyzer: Analyzer, prefix: str = "i") -> Index:
    """One fresh variable an axis, bound to the axis's range."""
    variables = [tirx.Var(f"{prefix}{k}", "int64") for k in range(len(extents))]
    for var, extent in zip(variables, extents, strict=True):
        analyzer.bind(var, tvm.ir.Range(0, extent))
    return variables


def push_view(call: Expr, index: Index, analyzer: Analyzer) -> tuple[Expr, Index] | None:
    """(source, index in it) of element `index` of a view call; None if `call` is no view, or one that mixes axes."""
    rule = _VIEWS.get(op_name(call) or "")
    source_index = rule(call, index) if rule else None
    if source_index is None:
        return None
    return call.args[0], [analyzer.simplify(e) for e in source_index]


def view_step(scope: Scope, expr: Expr, index: Index, analyzer: Analyzer) -> tuple[Expr, Index] | None:
    """`push_view` on what a variable is bound to, parts of a split included."""
    value = scope.value(expr)
    if not isinstance(value, relax.TupleGetItem):
        return push_view(value, index, analyzer)
    split = scope.value(value.tuple_value)
    if op_name(split) != "split":
        return None
    axis = int(split.attrs.axis) % len(index)
    begin = 0
    for part in split.ty.fields[: value.index]:
        extent = static(part.shape.values[axis])
        if extent is None:
            return None
        begin += extent
    return split.args[0], [x + begin if k == axis else x for k, x in enumerate(index)]


def is_view(call: Expr) -> bool:
    """Whether the operator only rearranges, repeats or picks elements."""
    return op_name(call) in _VIEWS


def peel(scope: Scope, expr: Expr, index: Index, analyzer: Analyzer) -> tuple[Expr, Index]:
    """Push `index` through every view above `expr`: (first expression that is no view, index in it)."""
    while (step := view_step(scope, expr, index, analyzer)) is not None:
        expr, index = step
    return scope.resolve(expr), index


def broadcast_index(expr: Expr, index: Index) -> Index:
    """The index into an operand of an elementwise operator whose result is read at `index`."""
    extents = shape(expr)
    offset = len(index) - len(extents)
    return [_ZERO if static(e) == 1 else index[offset + k] for k, e in enumerate(extents)]


def reshape_groups(source: list[Expr], target: list[Expr]) -> list[tuple[list[int], list[int]]] | None:
    """Axes of a reshape's source and target in groups of equal size; None where they can't be told apart.

    A symbolic extent pairs with itself only: [n, 12] -> [n, 3, 4] is ([0], [0]), ([1], [1, 2]), and [n, 4] -> [4, n]
    is None.
    """
    left = [k for k, e in enumerate(source) if static(e) != 1]
    right = [k for k, e in enumerate(target) if static(e) != 1]
    groups = []
    while left or right:
        if not left or not right:
            return None
        a, b = [left.pop(0)], [right.pop(0)]
        size_a, size_b = static(source[a[0]]), static(target[b[0]])
        symbolic = size_a is None or size_b is None
        if symbolic and (size_a != size_b or not same_extent(source[a[0]], target[b[0]])):
            return None
        while size_a != size_b and size_a is not None and size_b is not None:
            group, rest, extents = (a, left, source) if size_a < size_b else (b, right, target)
            factor = static(extents[rest[0]]) if rest else None
            if factor is None:
                return None
            group.append(rest.pop(0))
            size_a, size_b = (size_a * factor, size_b) if group is a else (size_a, size_b * factor)
        groups.append((a, b))
    return groups


def _reshape(call: Expr, index: Index) -> Index | None:
    source, target = shape(call.args[0]), shape(call)
    groups = reshape_groups(source, target)
    if groups is None:
        return None
    result: Index = [_ZERO] * len(source)
    for source_axes, target_axes in groups:
        flat = _ZERO
        for k in target_axes:
            flat = flat * target[k] + index[k]
        for k in reversed(source_axes):
            outermost = k == source_axes[0]
            result[k] = flat if outermost else tirx.floormod(flat, source[k])
            flat = tirx.floordiv(flat, source[k])
    return result


def _permute_dims(call: Expr, index: Index) -> Index:
    rank = len(index)
    axes = integers(call.attrs.axes) if call.attrs.axes is not None else list(range(rank))[::-1]
    result: Index = [_ZERO] * rank
    for k, axis in enumerate(axes):
        result[axis % rank] = index[k]
    return result


def _broadcast_to(call: Expr, index: Index) -> Index:
    return broadcast_index(call.args[0], index)


def _repeat(call: Expr, index: Index) -> Index | None:
    if call.attrs.axis is None:
        return None
    axis = call.attrs.axis % len(index)
    return [tirx.floordiv(x, call.attrs.repeats) if k == axis else x for k, x in enumerate(index)]


def _take(call: Expr, index: Index) -> Index | None:
    """x[c] along an axis, with a constant scalar c."""
    at = scalar(call.args[1])
    if at is None or shape(call.args[1]):
        return None
    axis, extent = call.attrs.axis or 0, static(shape(call.args[0])[call.attrs.axis or 0])
    if at < 0 and extent is None:
        return None
    at = int(at) + (extent if at < 0 else 0)  # type: ignore[operator]
    return [*index[:axis], tirx.const(at, "int64"), *index[axis:]]


def slice_ranges(call: Expr) -> dict[int, tuple[int, int, int]] | None:
    """axis -> (begin, end, step) of a strided_slice with constant bounds, negative ones resolved; None otherwise."""
    source = call.args[0]
    try:
        axes, begins, ends = (integers(a) for a in call.args[1:4])
        steps = integers(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    except ValueError:
        return None
    ranges = {}
    for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True):
        extent = static(shape(source)[axis])
        if step < 1 or (extent is None and (begin != 0 or end < _END or step != 1)):
            return None  # a slice of a symbolic axis is a view only where it keeps all of it
        if extent is not None:
            begin, end = (max(x + extent, 0) if x < 0 else min(x, extent) for x in (begin, end))
        ranges[axis % len(shape(source))] = (begin, end, step)
    return ranges


def _strided_slice(call: Expr, index: Index) -> Index | None:
    ranges = slice_ranges(call)
    if ranges is None:
        return None
    return [x * ranges[k][2] + ranges[k][0] if k in ranges else x for k, x in enumerate(index)]


# expand_dims, squeeze and flatten are reshapes: their extents say all.
_VIEWS: dict[str, Callable[[Expr, Index], Index | None]] = {
    "permute_dims": _permute_dims,
    "reshape": _reshape,
    "expand_dims": _reshape,
    "squeeze": _reshape,
    "flatten": _reshape,
    "broadcast_to": _broadcast_to,
    "repeat": _repeat,
    "take": _take,
    "strided_slice": _strided_slice,
}


def simplify_chain(scope: Scope, var: Expr) -> tuple[Expr, bool] | None:
    """The furthest source with the elements of the view `var` in the same order: (source, whether of the same shape).

    Where the shape differs, a reshape of the source is `var`. None: no such source.
    """
    analyzer = tvm.sym.Analyzer()
    extents = shape(var)
    start = index_vars(extents, analyzer)
    target = flat_index(start, extents)
    best, expr, index = None, var, start
    while (step := view_step(scope, expr, index, analyzer)) is not None:
        expr, index = step
        if not isinstance(expr, relax.Var) or not _same_size(shape(expr), extents):
            continue
        if analyzer.can_prove_equal(flat_index(index, shape(expr)), target):
            best = expr
    if best is None:
        return None
    best_shape = shape(best)
    equal = len(best_shape) == len(extents) and all(same_extent(a, b) for a, b in zip(best_shape, extents, strict=True))
    return scope.resolve(best), equal


def flat_index(index: Index, extents: list[Expr]) -> Expr:
    """The row-major offset of an element."""
    flat = _ZERO
    for x, extent in zip(index, extents, strict=True):
        flat = flat * extent + x
    return flat


def _same_size(a: list[Expr], b: list[Expr]) -> bool:
    def split(extents: list[Expr]) -> tuple[int, list[Expr]]:
        product, symbolic = 1, []
        for e in extents:
            value = static(e)
            if value is None:
                symbolic.append(e)
            else:
                product *= value
        return product, symbolic

    (x, sx), (y, sy) = split(a), split(b)
    return x == y and len(sx) == len(sy) and all(same_extent(p, q) for p, q in zip(sx, sy, strict=True))


def simplify_views(mod: tvm.IRModule) -> tvm.IRModule:
    """Chains of views that undo each other vanish; those that only regroup axes become one reshape.

    before   a = permute_dims(x, [1, 0, 2]);  b = permute_dims(a, [1, 0, 2]);  c = reshape(reshape(b, ..), s)
    after    c = reshape(x, s)
    before   a, b = y[:, :3], y[:, 3:];  c = concat([a, b], axis=1)
    after    y in place of c
    """
    _, func = main_function(mod)
    scope = Scope(func)
    rules: dict[Any, Rule] = {}
    for var, value in scope.definition.items():
        if is_view(value):
            found = simplify_chain(scope, var)
        else:
            found = joined_whole(scope, var) if op_name(value) == "concat" else None
        if found is not None:
            rules[var] = _simplified(*found, shape(var))
    return rebuild(mod, rules)


def joined_whole(scope: Scope, var: Expr) -> tuple[Expr, bool] | None:
    """The tensor of which a concat joins all parts in order, as `simplify_chain` gives it; None if it does not."""
    concat = scope.value(var)
    extents = shape(var)
    axis, begin, source = int(concat.attrs.axis) % len(extents), 0, None
    for part in concat.args[0].fields:
        analyzer = tvm.sym.Analyzer()
        start = index_vars(shape(part), analyzer)
        whole, index = peel(scope, part, start, analyzer)
        expected = [x + begin if k == axis else x for k, x in enumerate(start)]
        size = static(shape(part)[axis])
        if size is None or not isinstance(whole, relax.Var) or not same_shape(shape(whole), extents):
            return None
        if source is not None and not whole.same_as(source):
            return None
        if not all(analyzer.can_prove_equal(x, y) for x, y in zip(index, expected, strict=True)):
            return None
        source, begin = whole, begin + size
    return source, True


def _simplified(source: Expr, equal: bool, extents: list[Expr]) -> Rule:
    return lambda emit: emit.map(source) if equal else relax.op.reshape(emit.map(source), extents)
