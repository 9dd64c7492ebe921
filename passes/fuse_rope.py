"""Rotary embeddings spelled out with slices and products become one composite."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from tilewright.compiler.bodies import add_composite
from tilewright.compiler.composites import RopeSpec
from tilewright.compiler.operators import UNARY
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Rule,
    Scope,
    main_function,
    op_name,
    rebuild,
    same_extent,
    same_shape,
    shape,
    static,
)
from tilewright.compiler.views import Analyzer, Index, broadcast_index, index_vars, peel, simplify_views, view_step


@dataclass(frozen=True)
class FuseRope(Pass):
    """Find rotations of the pairs (i, i + D/2) by what each element of the result is.

    before   a, b = x[..., :D/2], x[..., D/2:];  y = concat([a * cos - b * sin, b * cos + a * sin])
    before   y = x * concat([cos, cos]) + concat([-x[..., D/2:], x[..., :D/2]]) * concat([sin, sin])
    after    y = rope(x, cos, sin)                # x[n,h,D] cos, sin[n,D/2]

    The result's element d must be x[d] * cos[d] - x[d + D/2] * sin[d], and d + D/2 its counterpart with the same cosine
    and sine: where those are tables of size D, their halves are proven equal first.
    """

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        scope = Scope(func)
        tables = _Tables()
        rules: dict[Any, Rule] = {}
        for var, value in scope.definition.items():
            if op_name(value) not in ("concat", "add", "subtract") or not _is_per_head(var):
                continue
            rotation = _match(scope, var)
            if rotation is not None:
                rules[var] = _replacement(rotation, tables)
        return simplify_views(rebuild(mod, rules))


def _is_per_head(var: Any) -> bool:
    """[n, h, D] or [h, n, D] with an even D."""
    extents = [static(e) for e in shape(var)] if isinstance(var.ty, relax.TensorType) else []
    return len(extents) == 3 and extents[2] is not None and extents[2] % 2 == 0 and extents[:2].count(None) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What an element is


@dataclass(frozen=True)
class _Read:
    """An element of a tensor, as every tensor of a chain of views sees it: [(tensor, index), ..], the source last."""

    chain: list[tuple[Expr, Index]]

    @property
    def source(self) -> tuple[Expr, Index]:
        return self.chain[-1]


@dataclass(frozen=True)
class _Term:
    """sign * left * right"""

    sign: int
    left: _Read
    right: _Read


class _Elements:
    """Says what elements are, as sums of products of reads, through views, joins, sums and signs."""

    def __init__(self, scope: Scope, analyzer: Analyzer) -> None:
        self.scope, self.ana = scope, analyzer

    def terms(self, expr: Expr, index: Index, sign: int = 1) -> list[_Term] | None:
        """The products whose sum is element `index` of `expr`; None if it is no such sum."""
        expr, index = peel(self.scope, expr, index, self.ana)
        value = self.scope.value(expr)
        name = op_name(value)
        if name == "concat":
            part = self.part(value, index)
            return self.terms(*part, sign) if part else None
        if name == "negative":
            return self.terms(value.args[0], index, -sign)
        if name in ("add", "subtract"):
            signs = (sign, sign if name == "add" else -sign)
            sums = [self.terms(a, broadcast_index(a, index), s) for a, s in zip(value.args, signs, strict=True)]
            return None if any(s is None for s in sums) else [t for s in sums for t in s or ()]
        if name == "multiply":
            (s, left), (t, right) = (self.read(a, broadcast_index(a, index)) for a in value.args)
            return [_Term(sign * s * t, left, right)]
        return None

    def read(self, expr: Expr, index: Index) -> tuple[int, _Read]:
        """The sign and the read that element `index` of `expr` is."""
        sign, chain = 1, [(expr, index)]
        while True:
            expr, index = chain[-1]
            value = self.scope.value(expr)
            step = view_step(self.scope, expr, index, self.ana)
            if step is not None:
                chain.append(step)
            elif op_name(value) == "negative":
                sign, chain = -sign, [(value.args[0], index)]
            elif op_name(value) == "concat" and (part := self.part(value, index)) is not None:
                chain = [part]
            else:
                return sign, _Read([(self.scope.resolve(e), x) for e, x in chain])

    def part(self, concat: Expr, index: Index) -> tuple[Expr, Index] | None:
        """The field of a concat that holds element `index`, and the index in it; None if that depends on the index."""
        axis, first = int(concat.attrs.axis) % len(index), 0
        bound = self.ana.const_int_bound(index[axis])
        for part in concat.args[0].fields:
            extent = static(shape(part)[axis])
            if extent is None:
                return None
            if first <= bound.min_value and bound.max_value < first + extent:
                inner = self.ana.simplify(index[axis] - first)
                return part, [*index[:axis], inner, *index[axis + 1 :]]
            first += extent
        return None

    def same_index(self, a: Index, b: Index) -> bool:
        return len(a) == len(b) and all(self.ana.can_prove_equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Matching


@dataclass(frozen=True)
class _Table:
    """f32[n, D/2] of cosines or sines: `steps` applied to `source`, innermost first; unit axes of it aside.

    A step is a unary operator (its call, None), or a multiplication by a number (its call, number).
    """

    source: Expr
    steps: tuple[tuple[Expr, float | None], ...] = ()


@dataclass(frozen=True)
class _Rotation:
    x: Expr
    order: tuple[int, int, int]  # axes of x that are token, head, dim
    result_order: tuple[int, int, int]
    cos: _Table
    sin: _Table


def _match(scope: Scope, var: Any) -> _Rotation | None:
    analyzer = Analyzer()
    *extents, size = shape(var)
    half = (static(size) or 0) // 2
    outer = index_vars(extents, analyzer, "o")
    dim = index_vars([tirx.const(half, "int64")], analyzer, "d")[0]
    elements = _Elements(scope, analyzer)
    low, high = elements.terms(var, [*outer, dim]), elements.terms(var, [*outer, dim + half])
    if low is None or high is None or not len(low) == len(high) == 2:
        return None
    token = next(k for k, e in enumerate(extents) if static(e) is None)
    matcher = _RotationMatcher(
        elements, outer[token], outer[1 - token], dim, half, [extents[token], extents[1 - token], size]
    )
    for a, b, c, d in _assignments(low, high):
        rotation = matcher.rotation(a, b, c, d, (token, 1 - token, 2))
        if rotation is not None:
            return rotation
    return None


def _assignments(low: list[_Term], high: list[_Term]) -> Iterator[tuple[tuple[_Read, _Read], ...]]:
    """(x, cos), (x, sin) of the low half, then of the high half: low = + -, high = + +; factors in either order."""
    minus, plus = sorted(low, key=lambda t: t.sign)
    if (minus.sign, plus.sign) != (-1, 1) or any(t.sign != 1 for t in high):
        return

    def both(term: _Term) -> tuple[tuple[_Read, _Read], tuple[_Read, _Read]]:
        return (term.left, term.right), (term.right, term.left)

    for a in both(plus):
        for b in both(minus):
            for first, second in ((high[0], high[1]), (high[1], high[0])):
                for c in both(first):
                    for d in both(second):
                        yield a, b, c, d


@dataclass(frozen=True)
class _RotationMatcher:
    elements: _Elements
    token: Expr
    head: Expr
    dim: Expr
    half: int
    extents: list[Expr]  # of token, head, dim

    def rotation(self, a: Any, b: Any, c: Any, d: Any, result_order: tuple[int, int, int]) -> _Rotation | None:
        """x0 * cos - x1 * sin below, x1 * cos + x0 * sin above: `a`, `b`, `c`, `d` are those pairs."""
        x = self._vector(a[0], b[0])
        if x is None or not (self._same(a[0], d[0]) and self._same(b[0], c[0])):
            return None
        cos, sin = self._table(a[1], c[1]), self._table(b[1], d[1])
        if cos is None or sin is None:
            return None
        return _Rotation(x[0], x[1], result_order, cos, sin)

    def _same(self, a: _Read, b: _Read) -> bool:
        (x, i), (y, j) = a.source, b.source
        return x.same_as(y) and self.elements.same_index(i, j)

    def _vector(self, low: _Read, high: _Read) -> tuple[Expr, tuple[int, int, int]] | None:
        """The deepest tensor read at [token, head, d] in one and [token, head, d + D/2] in the other; its axes."""
        for x, index in reversed(low.chain):
            order = self._order(index)
            if order is None or not same_shape([shape(x)[a] for a in order], self.extents):
                continue
            other = [*index]
            other[order[2]] = self.dim + self.half
            for y, high_index in high.chain:
                if x.same_as(y) and self.elements.same_index(high_index, other):
                    return x, order
        return None

    def _order(self, index: Index) -> tuple[int, int, int] | None:
        if len(index) != 3:
            return None
        positions = []
        for var in (self.token, self.head, self.dim):
            found = [k for k, e in enumerate(index) if e.same_as(var) and k not in positions]
            if not found and var.same_as(self.head):  # a single head is read at 0
                found = [k for k, e in enumerate(index) if static(e) == 0]
            if len(found) != 1:
                return None
            positions.append(found[0])
        return positions[0], positions[1], positions[2]

    def _table(self, low: _Read, high: _Read) -> _Table | None:
        """The [n, D/2] tensor that both halves read at (token, d)."""
        if not self._same_value(low, high):
            return None
        return self._half_table(low)

    def _same_value(self, a: _Read, b: _Read) -> bool:
        """Whether two reads are the same number: the same element, or the same operators on the same elements."""
        if self._same(a, b):
            return True
        (x, i), (y, j) = a.source, b.source
        inner, other = self._operand(x, i), self._operand(y, j)
        if inner is None or other is None:
            return False
        same_step = inner[0].op.same_as(other[0].op) and inner[1] == other[1]
        return same_step and self._same_value(inner[2], other[2])

    def _operand(self, expr: Expr, index: Index) -> tuple[Expr, float | None, _Read] | None:
        """(call, None, operand's read) of a unary operator, (call, c, operand's read) of x * c."""
        scope = self.elements.scope
        value = scope.value(expr)
        scaled = scope.without_number(expr, "multiply")
        if scaled is not None:
            operand, number = scaled
        elif op_name(value) in UNARY and len(value.args) == 1:
            operand, number = value.args[0], None
        else:
            return None
        sign, read = self.elements.read(operand, broadcast_index(operand, index))
        return (value, number, read) if sign == 1 else None

    def _half_table(self, read: _Read) -> _Table | None:
        tables = [tensor for tensor, index in read.chain if self._is_half_table(tensor, index)]
        if tables:
            return _Table(min(tables, key=lambda t: len(shape(t))))
        inner = self._operand(*read.source)
        table = self._half_table(inner[2]) if inner else None
        return _Table(table.source, (*table.steps, inner[:2])) if table and inner else None

    def _is_half_table(self, tensor: Expr, index: Index) -> bool:
        """[n, D/2] read at (token, d), unit axes aside."""
        wide = [(e, x) for e, x in zip(shape(tensor), index, strict=True) if static(e) != 1]
        if len(wide) != 2:
            return False
        (rows, token), (columns, dim) = wide
        sized = same_extent(rows, self.extents[0]) and static(columns) == self.half
        return sized and token.same_as(self.token) and dim.same_as(self.dim)


# ---------------------------------------------------------------------------------------------------------------------
# Rewriting


class _Tables:
    """Tables of cosines and sines that were emitted already, shared by all rotations of a function."""

    def __init__(self) -> None:
        self.emitted: dict[Any, Expr] = {}

    def emit(self, emit: Emitter, table: _Table) -> Expr:
        tensor: Expr = emit.map(table.source)
        key: tuple[Any, ...] = (table.source,)
        extents = [e for e in shape(table.source) if static(e) != 1]
        if len(extents) < len(shape(table.source)):
            if key not in self.emitted:
                self.emitted[key] = emit(relax.op.reshape(tensor, extents))
            tensor = self.emitted[key]
        for call, number in table.steps:
            key = (*key, op_name(call), str(call.attrs), number)
            if key not in self.emitted:
                args = [tensor] if number is None else [tensor, relax.const(number, "float32")]
                self.emitted[key] = emit(relax.Call(call.op, args, call.attrs))
            tensor = self.emitted[key]
        return tensor


def _replacement(rotation: _Rotation, tables: _Tables) -> Rule:
    def emit(emitter: Emitter) -> Expr:
        cos, sin = (tables.emit(emitter, t) for t in (rotation.cos, rotation.sin))
        x = emitter.map(rotation.x)
        if rotation.order != (0, 1, 2):
            x = emitter(relax.op.permute_dims(x, list(rotation.order)))
        heads, size = (static(e) or 0 for e in shape(x)[1:])
        function = add_composite(emitter.builder, "rope", RopeSpec(heads, size))
        out = relax.Call(function, [x, cos, sin])
        if rotation.result_order == (0, 1, 2):
            return out
        back = [rotation.result_order.index(k) for k in range(3)]
        return relax.op.permute_dims(emitter(out, "rope"), back)

    return emit
