"""Attention spelled out as softmax(scale * q k^T + mask) v becomes one composite."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from tilewright.compiler.bodies import add_composite
from tilewright.compiler.composites import AttentionSpec
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Rule,
    Scope,
    dtype,
    main_function,
    op_name,
    rebuild,
    same_extent,
    shape,
    shortest,
    static,
)
from tilewright.compiler.scalar_values import HIDDEN, Mask, classify_mask, scalar_at
from tilewright.compiler.views import (
    Analyzer,
    Index,
    broadcast_index,
    flat_index,
    index_vars,
    is_view,
    peel,
    simplify_views,
    view_step,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Find attention by index maps, in any spelling of transposes, repeats, masks, scales and casts.

    before   k1 = repeat(k, H // G, axis=1);  s = matmul(permute_dims(q), permute_dims(k1)) * scale
             p = softmax(where(tril(ones(n, n)), s, -1e30));  o = permute_dims(matmul(p, permute_dims(v1)))
    after    o = attention(q, k, v)            # q[n,H,D] k, v[n,G,D] -> [n,H,D]

    What looks like attention and is not one stays; the reason is logged and kept in the attribute `tw.refused`.
    """

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        scope = Scope(func)
        rules: dict[Any, Rule] = {}
        refused: dict[str, str] = {}
        for var, value in scope.definition.items():
            softmax = _softmax_behind(scope, value)
            if softmax is None:
                continue
            try:
                rules[var] = _replacement(_Matcher(scope, value).match(), shape(var))
            except _NoMatch as reason:
                refused[var.name] = str(reason)
                logger.debug("%s: %s is left alone: %s", self.name, var.name, reason)
        attrs = {"tw.stage": "fused", "tw.refused": json.dumps(refused, sort_keys=True) if refused else None}
        return simplify_views(rebuild(mod, rules, attrs=attrs))


class _NoMatch(Exception):
    """Why this is not an attention that a spec can say."""


@dataclass(frozen=True)
class _Source:
    """A tensor and which of its axes are token and head dimension; the others, in order, count the heads."""

    tensor: Expr
    token: int
    dim: int

    @property
    def head_axes(self) -> list[int]:
        return [a for a in range(len(shape(self.tensor))) if a not in (self.token, self.dim)]

    @property
    def heads(self) -> int:
        """0 where an extent is symbolic."""
        return _product([shape(self.tensor)[a] for a in self.head_axes])

    def head_at(self, index: Index) -> Expr:
        """The head that is read at `index`."""
        extents = shape(self.tensor)
        return flat_index([index[a] for a in self.head_axes], [extents[a] for a in self.head_axes])

    def emit(self, emit: Emitter) -> Expr:
        """The tensor as [token, head, dim]."""
        extents, x = shape(self.tensor), emit.map(self.tensor)
        order = [self.token, *self.head_axes, self.dim]
        if order != sorted(order):
            x = emit(relax.op.permute_dims(x, order))
        if len(order) == 3:
            return x
        return emit(relax.op.reshape(x, [extents[self.token], self.heads, extents[self.dim]]))


@dataclass(frozen=True)
class _Attention:
    q: _Source
    k: _Source
    v: _Source
    spec: AttentionSpec


def _replacement(found: _Attention, extents: list[Expr]) -> Rule:
    """The composite, its result brought to the layout [.., n, D] of the matmul that it replaces."""

    def emit(emitter: Emitter) -> Expr:
        function = add_composite(emitter.builder, "attention", found.spec)
        args = [source.emit(emitter) for source in (found.q, found.k, found.v)]
        out = emitter(relax.op.permute_dims(emitter(relax.Call(function, args), "attention"), [1, 0, 2]))
        return out if len(extents) == 3 else relax.op.reshape(out, extents)

    return emit


def _softmax_behind(scope: Scope, value: Expr) -> Expr | None:
    """The softmax that the left side of a matmul comes from, through whatever views, casts and selections."""
    if op_name(value) != "matmul":
        return None
    expr = value.args[0]
    while True:
        inner = scope.value(expr)
        name = op_name(inner)
        if name == "nn.softmax":
            return inner
        if name == "where":
            expr = inner.args[2]
        elif name == "astype" or is_view(inner):
            expr = inner.args[0]
        else:
            return None


class _Matcher:
    """Matches one matmul(softmax(..), v), read at [.., i, d] with keys j and contraction c."""

    def __init__(self, scope: Scope, matmul: Expr) -> None:
        self.scope, self.matmul, self.ana = scope, matmul, Analyzer()
        self.extents = shape(matmul)
        if len(self.extents) < 2:
            raise _NoMatch("its result is a vector; attention gives [.., n, D]")
        self.index = index_vars(self.extents, self.ana, "o")
        self.batch, self.query, self.dim = self.index[:-2], self.index[-2], self.index[-1]
        self.key = self._var("j", shape(matmul.args[0])[-1])
        # Axes before the last two count heads in row-major order, however many they are.
        self.head = self.ana.simplify(flat_index(self.batch, self.extents[:-2]))

    def match(self) -> _Attention:
        if any(static(e) is None for e in self.extents[:-2]):
            raise _NoMatch("an axis other than the tokens' is symbolic")
        if not same_extent(self.extents[-2], shape(self.matmul.args[0])[-1]):
            raise _NoMatch("queries and keys differ in number")
        softmax, index = self._probabilities()
        score = _Score(self.scope, self.ana, self.query, self.key)
        product, index = score.walk(softmax.args[0], index)
        if op_name(product) != "matmul":
            raise _NoMatch(f"{op_name(product) or 'an input'} stands between q k^T and the softmax")
        return self._assemble(score, product, index)

    def _assemble(self, score: "_Score", product: Expr, index: Index) -> _Attention:
        left, right = product.args
        head_dim = static(self.extents[-1])
        if head_dim is None or static(shape(left)[-1]) != head_dim:
            raise _NoMatch(f"q and k have head size {shape(left)[-1]}, v has {self.extents[-1]}")
        contracted = self._var("c", shape(left)[-1])
        query_index = [*broadcast_index_batch(left, index[:-2]), index[-2], contracted]
        key_index = [*broadcast_index_batch(right, index[:-2]), contracted, index[-1]]
        q, q_scale = self._source("q", left, query_index, self.query, contracted, self._query_head)
        k, k_scale = self._source("k", right, key_index, self.key, contracted, self._kv_head)
        value_index = [*broadcast_index_batch(self.matmul.args[1], self.batch), self.key, self.dim]
        v, v_scale = self._source("v", self.matmul.args[1], value_index, self.key, self.dim, self._kv_head)
        if v_scale != 1.0:
            raise _NoMatch(f"v is multiplied by {v_scale}")
        if k.heads != v.heads:
            raise _NoMatch(f"k and v have {k.heads} and {v.heads} heads")
        mask = score.mask()
        scale = score.scale * q_scale * k_scale
        spec = AttentionSpec(
            heads=q.heads,
            kv_heads=k.heads,
            head_dim=head_dim,
            scale=shortest(scale),
            causal=mask.causal,
            window=mask.window,
            soft_cap=None if score.soft_cap is None else shortest(score.soft_cap),
        )
        return _Attention(q, k, v, spec)

    def _var(self, name: str, extent: Expr) -> Expr:
        var = tirx.Var(name, "int64")
        self.ana.bind(var, tvm.ir.Range(0, extent))
        return var

    def _probabilities(self) -> tuple[Expr, Index]:
        """The softmax behind the matmul's left side, and the index in it."""
        left = self.matmul.args[0]
        expr, index = peel(self.scope, left, [*broadcast_index_batch(left, self.batch), self.query, self.key], self.ana)
        expr, index = self._without_dead_row_guard(expr, index)
        while self.scope.is_op(expr, "astype"):
            expr, index = peel(self.scope, self.scope.args(expr)[0], index, self.ana)
        softmax = self.scope.value(expr)
        if op_name(softmax) != "nn.softmax":
            raise _NoMatch(f"{op_name(softmax) or 'an input'} stands between the softmax and v")
        axis = softmax.attrs.axis % len(index)
        if not index[axis].same_as(self.key):
            raise _NoMatch("the softmax is not over the keys")
        return softmax, index

    def _without_dead_row_guard(self, expr: Expr, index: Index) -> tuple[Expr, Index]:
        """torch's where(not any(scores != -inf), 0, softmax(scores)): a causal mask leaves no row without a key."""
        if not self.scope.is_op(expr, "where"):
            return expr, index
        condition, zero, probabilities = self.scope.args(expr)
        value = scalar_at(self.scope, zero, broadcast_index(zero, index), self.ana)
        inner = broadcast_index(probabilities, index)
        softmax = self.scope.value(peel(self.scope, probabilities, inner, self.ana)[0])
        if (
            value is None
            or not self.ana.can_prove_equal(value, tirx.const(0, value.ty.dtype))
            or op_name(softmax) != "nn.softmax"
            or not self._is_no_key_visible(condition, softmax.args[0])
        ):
            raise _NoMatch("a selection stands between the softmax and v")
        return peel(self.scope, probabilities, inner, self.ana)

    def _is_no_key_visible(self, condition: Expr, scores: Expr) -> bool:
        """not max(not (scores == lowest), keys), with casts to and from the integers that max wants."""
        scope = self.scope

        def uncast(expr: Expr) -> Expr:
            while scope.is_op(expr, "astype"):
                expr = scope.args(expr)[0]
            return expr

        for name in ("logical_not", "max", "logical_not"):
            expr = uncast(condition)
            if not scope.is_op(expr, name):
                return False
            condition = scope.args(expr)[0]
        equal = uncast(condition)
        if not scope.is_op(equal, "equal"):
            return False
        compared, bound = scope.args(equal)
        lowest = scope.number(bound)
        return lowest is not None and lowest <= HIDDEN and scope.same(compared, scores)

    def _query_head(self, heads: int) -> Expr | None:
        """The head of q that this result belongs to, where q has that number of heads."""
        return self.head if heads == _product(self.extents[:-2]) else None

    def _kv_head(self, kv_heads: int) -> Expr | None:
        """The KV head that this query head reads, where there is that number of KV heads."""
        heads = _product(self.extents[:-2])
        return None if not kv_heads or heads % kv_heads else tirx.floordiv(self.head, heads // kv_heads)

    def _source(
        self, name: str, expr: Expr, index: Index, token: Expr, dim: Expr, head: Callable[[int], Expr | None]
    ) -> tuple[_Source, float]:
        """The deepest tensor, its axes in any order, that is read at (token, head, dim); and the factor on it."""
        best, factor, read = None, 1.0, None
        while True:
            source = _source_at(expr, index, token, dim, (self.extents[-2], self.extents[-1]))
            if source is not None:
                read, wanted = (source.head_at(index), source.heads), head(source.heads)
                if wanted is not None and self.ana.can_prove_equal(read[0], wanted):
                    best = (source, factor)
            step = view_step(self.scope, expr, index, self.ana)
            if step is not None:
                expr, index = step
                continue
            scaled = _scaled(self.scope, expr)
            if scaled is None:
                break
            expr, factor = scaled[0], factor * scaled[1]
            index = broadcast_index(expr, index)
        if best is not None:
            return best
        if read is None:
            raise _NoMatch(f"{name} is no [token, head, dim] tensor in any order")
        raise _NoMatch(f"query head {self.head} reads head {self.ana.simplify(read[0])} of the {read[1]} in {name}")


def _source_at(expr: Expr, index: Index, token: Expr, dim: Expr, extents: tuple[Expr, Expr]) -> _Source | None:
    """`expr` with its token and dim axes, where one axis each is read at these, and is of their extents."""
    found = []
    for var, extent in zip((token, dim), extents, strict=True):
        axes = [a for a, x in enumerate(index) if x.same_as(var)]
        if len(axes) != 1 or not same_extent(shape(expr)[axes[0]], extent):
            return None
        found += axes
    return _Source(expr, *found)


class _Score:
    """What stands between q k^T and the softmax: a factor, a soft cap, masks."""

    def __init__(self, scope: Scope, analyzer: Analyzer, query: Expr, key: Expr) -> None:
        self.scope, self.ana, self.query, self.key = scope, analyzer, query, key
        self.scale = 1.0
        self.soft_cap: float | None = None
        self.masks: list[Expr] = []

    def walk(self, expr: Expr, index: Index) -> tuple[Expr, Index]:
        """Back from the softmax's input to the first thing that is no part of a score, and the index in it."""
        while True:
            expr, index = peel(self.scope, expr, index, self.ana)
            value = self.scope.value(expr)
            name = op_name(value)
            scaled = _scaled(self.scope, expr)
            if scaled is not None:
                expr, self.scale = scaled[0], self.scale * scaled[1]
            elif name in ("add", "subtract"):
                expr = self._bias(value, index)
            elif name == "where":
                expr = self._selection(value, index)
            elif name == "tanh":
                expr = self._cap(value)
            else:
                return value, index
            index = broadcast_index(expr, index)

    def mask(self) -> Mask:
        mask = Mask()
        for bias in self.masks:
            found = classify_mask(bias, self.query, self.key)
            if found is None:
                raise _NoMatch(f"the mask {bias} is neither causal nor a sliding window")
            mask &= found
        if mask.window is not None and not mask.causal:
            raise _NoMatch("its window looks ahead too")
        return mask

    def _cap(self, tanh: Expr) -> Expr:
        """Going back over cap * tanh(s / cap): the factor so far is the cap, those before it make the scale."""
        if self.soft_cap is not None or self.scale <= 0:
            raise _NoMatch("its scores are capped twice, or by a cap that is not positive")
        self.soft_cap = self.scale
        return tanh.args[0]

    def _bias(self, value: Expr, index: Index) -> Expr:
        """score + mask, in either order, or score - mask."""
        left, right = value.args
        bias = scalar_at(self.scope, right, broadcast_index(right, index), self.ana)
        if bias is not None:
            self._add(bias if op_name(value) == "add" else -bias)
            return left
        bias = scalar_at(self.scope, left, broadcast_index(left, index), self.ana)
        if bias is None or op_name(value) == "subtract":
            raise _NoMatch("a bias on the scores depends on data")
        self._add(bias)
        return right

    def _selection(self, value: Expr, index: Index) -> Expr:
        """where(visible, score, low) or where(hidden, low, score)."""
        condition, first, second = value.args
        chosen = scalar_at(self.scope, condition, broadcast_index(condition, index), self.ana)
        if chosen is None:
            raise _NoMatch("its mask depends on data")
        zero = tirx.const(0.0, "float32")
        for score, low, hidden in ((first, second, tirx.Not(chosen)), (second, first, chosen)):
            fill = scalar_at(self.scope, low, broadcast_index(low, index), self.ana)
            if fill is not None:
                self._add(tirx.Select(hidden, fill, zero))
                return score
        raise _NoMatch("its mask selects between two tensors of data")

    def _add(self, bias: Expr) -> None:
        if self.soft_cap is not None:
            raise _NoMatch("its mask is applied before the soft cap, so masked keys keep weight")
        self.masks.append(bias * tirx.const(self.scale, "float32"))


def _scaled(scope: Scope, expr: Expr) -> tuple[Expr, float] | None:
    """(x, c) of x * c, c * x, x / c, and of a cast between floats (c = 1)."""
    value = scope.value(expr)
    product = scope.without_number(expr, "multiply")
    if product is not None:
        return product
    if op_name(value) == "divide" and scope.number(value.args[1]) is not None:
        return value.args[0], 1.0 / scope.number(value.args[1])
    if op_name(value) == "astype" and "float" in dtype(value.args[0]) and "float" in dtype(value):
        return value.args[0], 1.0
    return None


def broadcast_index_batch(operand: Expr, batch: Index) -> Index:
    """The index into the batch axes of a matmul's operand (all but the last two), which broadcast."""
    count = len(shape(operand)) - 2
    offset = len(batch) - count
    zero = tirx.const(0, "int64")
    return [zero if static(e) == 1 else batch[offset + k] for k, e in enumerate(shape(operand)[:count])]


def _product(extents: list[Expr]) -> int:
    product = 1
    for e in extents:
        product *= static(e) or 0
    return product
