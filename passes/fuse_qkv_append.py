"""What stands between a joint q, k, v projection and the pages becomes one composite."""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from tilewright.compiler.composites import AppendSpec, NormSpec, QKVAppendSpec
from tilewright.compiler.errors import CompileError
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Scope,
    bindings,
    composite_of,
    main_function,
    rebuild,
    shape,
    static,
)
from tilewright.compiler.served_bodies import add_served_composite
from tilewright.compiler.views import index_vars, push_view


@dataclass(frozen=True)
class FuseQKVAppend(Pass):
    """Split, norm, rotation and append in one. Stage "served".

    before   q, k, v = reshape(slices of qkv)                  # qkv[t, (H + 2G) D]
             q_1, k_1 = rope(rms_norm(q, g), cos, sin), rope(rms_norm(k, h), cos, sin)       # the norms are optional
             pages_1 = kv_append(pages, k_1, v, slots, layer)
             o = paged_attention(q_1, pages_1, ...)
    after    both = qkv_append(qkv, cos, sin, g, h, pages, slots, layer)
             o = paged_attention(both[0], both[1], ...)

    Where q, k and v come from separate linears they are concatenated first. Raises CompileError, naming the layer,
    where q and k are not both rotated by the same angles, or only one of them is normalised.
    """

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        matcher = _Matcher(mod, Scope(func))
        rules = {}
        for number, binding in enumerate(matcher.calls("kv_append")):
            layer = matcher.match(number, binding)
            rules[binding.var] = layer.append
            rules[layer.attention.var] = layer.attend
        return rebuild(mod, rules)


@dataclass(frozen=True)
class _Head:
    """q or k before its rotation: x[t,h,D], the angles, and the norm if there is one."""

    x: Expr
    cos: Expr
    sin: Expr
    norm: NormSpec | None
    norm_weight: tuple[Expr, ...]


@dataclass
class _Layer:
    """One layer's append and attention, in terms of the old function."""

    spec: QKVAppendSpec
    sources: list[Expr]  # qkv[t, (H + 2G) D]; or q, k and v, each [t, h, D] or [t, h D]
    q: _Head
    k: _Head
    binding: Any
    attention: Any
    both: Expr = None  # the new call's result, once emitted

    def append(self, emitter: Emitter) -> Expr:
        pages, _, _, slots, layer = self.binding.value.args
        function = add_served_composite(emitter.builder, "qkv_append", self.spec)
        weights = (*self.q.norm_weight, *self.k.norm_weight)
        rest = [emitter.map(a) for a in (self.q.cos, self.q.sin, *weights, pages, slots, layer)]
        self.both = emitter(relax.Call(function, [self._joint(emitter), *rest]), "qkv")
        return relax.TupleGetItem(self.both, 1)

    def attend(self, emitter: Emitter) -> Expr:
        call = self.attention.value
        q = emitter(relax.TupleGetItem(self.both, 0), "q")
        return relax.Call(call.op, [q, *[emitter.map(a) for a in call.args[1:]]])

    def _joint(self, emitter: Emitter) -> Expr:
        if len(self.sources) == 1:
            return emitter.map(self.sources[0])
        flat = [self._flat(emitter, emitter.map(s)) for s in self.sources]
        return emitter(relax.op.concat(flat, axis=1), "qkv")

    @staticmethod
    def _flat(emitter: Emitter, x: Expr) -> Expr:
        if len(shape(x)) == 2:
            return x
        t, heads, dim = shape(x)
        return emitter(relax.op.reshape(x, (t, heads * dim)))


class _Matcher:
    def __init__(self, mod: tvm.IRModule, scope: Scope) -> None:
        self.mod = mod
        self.scope = scope

    def calls(self, name: str) -> list[Any]:
        return [b for b in bindings(self.scope.func) if self.is_call(b.value, name)]

    def is_call(self, value: Expr, name: str) -> bool:
        found = composite_of(self.mod, value)
        return found is not None and found[0] == name

    def match(self, number: int, append: Any) -> _Layer:
        _, k_value, v, _, _ = append.value.args
        attention = self._attention(number, append)
        q = self._head(number, "q", attention.value.args[0])
        k = self._head(number, "k", k_value)
        if not (self.scope.same(q.cos, k.cos) and self.scope.same(q.sin, k.sin)):
            raise CompileError(f"attention layer {number} rotates q and k by different angles; they must be the same")
        if q.norm != k.norm:
            raise CompileError(f"attention layer {number} normalises q as {q.norm} and k as {k.norm}; make them equal")
        kv = self._append_spec(append).kv
        spec = QKVAppendSpec(static(shape(q.x)[1]), kv, q.norm)  # type: ignore[arg-type]
        return _Layer(spec, self._sources([q.x, k.x, v]), q, k, append, attention)

    def _append_spec(self, append: Any) -> AppendSpec:
        return composite_of(self.mod, append.value)[1]  # type: ignore[index]

    def _attention(self, number: int, append: Any) -> Any:
        """The one attention that reads the pages right after this append."""
        found = [b for b in self.calls("paged_attention") if b.value.args[1].same_as(append.var)]
        if len(found) != 1:
            raise CompileError(f"attention layer {number} has {len(found)} attentions on one append; it must have one")
        return found[0]

    def _head(self, number: int, name: str, expr: Expr) -> _Head:
        value = self.scope.value(expr)
        if not self.is_call(value, "rope"):
            raise CompileError(f"attention layer {number} uses {name} without a rope right before it; rotate it there")
        x, cos, sin = value.args
        inner = self.scope.value(x)
        if not self.is_call(inner, "rms_norm"):
            return _Head(x, cos, sin, None, ())
        return _Head(inner.args[0], cos, sin, composite_of(self.mod, inner)[1], (inner.args[1],))  # type: ignore[index]

    def _sources(self, parts: list[Expr]) -> list[Expr]:
        """[qkv] where q, k, v[t,h,D] are its columns in order and all of them; else q, k, v, flat where they were."""
        sizes = [static(shape(p)[1]) * static(shape(p)[2]) for p in parts]  # type: ignore[operator]
        starts = [0, sizes[0], sizes[0] + sizes[1]]
        for candidate in self._flat_sources(parts[0], sum(sizes)):
            if all(self._is_columns(p, candidate, start) for p, start in zip(parts, starts, strict=True)):
                return [candidate]
        return [
            next((c for c in self._flat_sources(p, size) if self._is_columns(p, c, 0)), p)
            for p, size in zip(parts, sizes, strict=True)
        ]

    def _flat_sources(self, part: Expr, width: int) -> list[Expr]:
        """The matrices of `width` columns that `part` is a view of."""
        sources = [expr for expr, _ in self._chain(part) if isinstance(expr, relax.Var) and len(shape(expr)) == 2]
        return [expr for expr in sources if static(shape(expr)[1]) == width]

    def _is_columns(self, part: Expr, source: Expr, start: int) -> bool:
        """Whether part[i, h, d] is source[i, start + h * D + d]."""
        dim = shape(part)[2]
        for expr, (index, (i, h, d), analyzer) in self._chain(part):
            if isinstance(expr, relax.Var) and self.scope.resolve(expr).same_as(self.scope.resolve(source)):
                column = h * dim + d + start
                return bool(analyzer.can_prove_equal(index[0], i) and analyzer.can_prove_equal(index[1], column))
        return False

    def _chain(self, part: Expr) -> list[Any]:
        """[(expression, (its index of element [i, h, d], [i, h, d], analyzer))] up the views of `part`."""
        analyzer = tvm.sym.Analyzer()
        start = index_vars(shape(part), analyzer)
        expr, index, chain = part, start, []
        while (step := push_view(self.scope.value(expr), index, analyzer)) is not None:
            expr, index = step
            chain.append((expr, (index, start, analyzer)))
        return chain
