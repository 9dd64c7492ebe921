"""One sequence becomes a ragged batch of tokens over a paged KV cache."""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import ir, relax

from tilewright.compiler.composites import STEP_INPUTS, AppendSpec, AttentionSpec, KVFormat, PagedAttentionSpec
from tilewright.compiler.errors import CompileError
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    bindings,
    composite_of,
    main_function,
    op_name,
    operands,
    remove_dead_code,
    substitute,
    symbolic_vars,
    weight_params,
)
from tilewright.compiler.served_bodies import PAGED_ATTENTION_INPUTS, add_served_composite, input_vars, pages_var
from tilewright.passes.token_axes import token_axes


@dataclass(frozen=True)
class InsertPagedKV(Pass):
    """Turn `forward` of stage "fused" into `logits` of stage "served".

    before   forward(tokens[n], *params):
                 positions = arange(0, n)
                 ...
                 o = attention(q, k, v)                                    # q[n,H,D] k, v[n,G,D]
                 y = linear(o, w)
    after    logits(tokens[t], positions[t], slots[t], indptr[b+1], ..., rows[r], pages, *params):
                 ...
                 pages_1 = kv_append(pages, k, v, slots, layer)            # q[t,H,D] k, v[t,G,D]
                 o = paged_attention(q, pages_1, positions, indptr, page_indptr, page_indices, kv_len, phases, layer)
                 y = linear(take(o, rows), w)                              # after the last attention: wanted rows only

    First it proves that nothing but attention mixes tokens (passes/token_axes.py). What some attention needs is
    computed for all t tokens, everything else for the r wanted rows alone: the border is crossed by one take a value.
    strict: a token gets the same bits whether it was generated or stands in a prompt.
    All layers share one KV geometry and one `pages`; a layer is its attention's place in the order of execution.

    Raises CompileError for a program that mixes tokens, that has no attention, or whose layers differ in KV geometry.
    """

    page_size: int
    kv_dtype: str = "float32"
    k_transposed: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise CompileError(f"page size is {self.page_size} tokens; it must be at least 1")

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        return _Paging(self, mod).rewrite()


class _Paging:
    def __init__(self, options: InsertPagedKV, mod: tvm.IRModule) -> None:
        self.mod = mod
        self.entry, self.func = main_function(mod)
        self.axes = token_axes(mod, self.func)
        attentions = [
            (b.var, found[1])
            for b in bindings(self.func)
            if (found := composite_of(mod, b.value)) is not None and found[0] == "attention"
        ]
        self.layers = {var: (layer, spec) for layer, (var, spec) in enumerate(attentions)}
        self.strict = options.strict
        self.kv = _kv_format(options, [spec for _, spec in attentions])
        self.needed = self._needed_by_attention()
        self._check_outputs()
        (self.length,) = symbolic_vars(self.func.params[0].ty)

    def _check_outputs(self) -> None:
        result = self.func.body.body
        axes = self.axes[result] if isinstance(result, relax.Var) else tuple(self.axes[f] for f in result.fields)
        for k, axis in enumerate(axes if isinstance(axes, tuple) else (axes,)):
            if axis != 0:
                raise CompileError(f"output {k} of the program has no row for each token along axis 0; it needs one")

    def _needed_by_attention(self) -> set[Any]:
        """The variables that are computed for all tokens: what attention reads, directly or not, and what it gives."""
        needed = set(self.layers)
        for binding in reversed(bindings(self.func)):
            if binding.var in needed:
                needed.update(operands(binding.value))
        return needed

    def rewrite(self) -> tvm.IRModule:
        others = {g: f for g, f in self.mod.functions.items() if g != self.entry}
        self.emit = Emitter(relax.BlockBuilder(tvm.IRModule(others)))
        self.narrow: dict[Any, Expr] = {}  # old variable -> its wanted rows
        extents: dict[str, Any] = {}
        self.inputs = input_vars(STEP_INPUTS, extents)
        self.all, self.wanted = {self.length: extents["t"]}, {self.length: extents["r"]}
        self.pages = pages_var(self.kv)
        weights = [relax.Var(p.name, p.ty) for p in weight_params(self.func)]
        self.emit.new.update(zip(self.func.params, [self.inputs["tokens"], *weights], strict=True))
        params = [*self.inputs.values(), self.pages, *weights]
        attrs = {
            "num_input": len(self.inputs) + 1,
            "tw.stage": "served",
            "tw.params": self.func.attrs["tw.params"],
        }
        builder = self.emit.builder
        with builder.function("logits", params, attrs=attrs):
            with builder.dataflow():
                for binding in bindings(self.func):
                    self._emit_binding(binding)
                output = builder.emit_output(self._rows(self.func.body.body))
            builder.emit_func_output(output)
        return remove_dead_code(builder.get(), "logits")

    def _emit_binding(self, binding: Any) -> None:
        var, value = binding.var, binding.value
        if var in self.layers:
            self.emit.new[var] = self._paged(value, *self.layers[var])
        elif op_name(value) == "arange" and self.axes[var] == 0:
            self.emit.new[var] = self._positions(value)
        elif var in self.needed or self.axes[var] is None:
            self.emit.new[var] = self.emit(self._map(value, rows=False), var.name)
        else:
            self.narrow[var] = self.emit(self._map(value, rows=True), var.name)

    def _paged(self, call: Expr, layer: int, spec: AttentionSpec) -> Expr:
        q, k, v, *sinks = (self.emit.new[a] for a in call.args)
        index = self.emit(relax.prim_value(layer), "layer")  # bound, since a literal argument does not parse back
        builder = self.emit.builder
        append = add_served_composite(builder, "kv_append", AppendSpec(self.kv))
        paged = PagedAttentionSpec(spec, self.kv, strict=self.strict)
        attend = add_served_composite(builder, "paged_attention", paged)
        self.pages = self.emit(relax.Call(append, [self.pages, k, v, self.inputs["slots"], index]), "pages")
        plan = [self.inputs[name] for name in PAGED_ATTENTION_INPUTS]
        return self.emit(relax.Call(attend, [q, self.pages, *plan, index, *sinks]), "attention")

    def _positions(self, arange: Expr) -> Expr:
        dtype = str(arange.ty.dtype)
        positions = self.inputs["positions"]
        return positions if dtype == "int32" else self.emit(relax.op.astype(positions, dtype), "positions")

    def _map(self, value: Expr, rows: bool) -> Expr:
        """An old expression over the new variables, for all tokens or for the wanted rows."""
        if isinstance(value, relax.Var):
            return self._rows(value) if rows else self.emit.new[value]
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self._map(f, rows) for f in value.fields])
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(self._map(value.tuple_value, rows), value.index)
        sizes = self.wanted if rows else self.all
        if isinstance(value, relax.ShapeExpr):
            return relax.ShapeExpr([substitute(e, sizes) for e in value.values])
        if isinstance(value, ir.Call):
            return relax.Call(value.op, [self._map(a, rows) for a in value.args], value.attrs, value.ty_args)
        return value

    def _rows(self, expr: Expr) -> Expr:
        """The wanted rows of an old value, gathered once where it was computed for all tokens."""
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._rows(f) for f in expr.fields])
        axis = self.axes[expr]
        if axis is None:
            return self.emit.new[expr]
        if expr not in self.narrow:
            if isinstance(axis, tuple):
                parts = [relax.TupleGetItem(self.emit.new[expr], i) for i in range(len(axis))]
                taken = [self._take(self.emit(p), a) for p, a in zip(parts, axis, strict=True)]
                self.narrow[expr] = relax.Tuple(taken)
            else:
                self.narrow[expr] = self._take(self.emit.new[expr], axis)
        return self.narrow[expr]

    def _take(self, value: Expr, axis: int | None) -> Expr:
        if axis is None:
            return value
        return self.emit(relax.op.take(value, self.inputs["rows"], axis=axis, mode="clip"), "rows")


def _kv_format(options: InsertPagedKV, layers: list[AttentionSpec]) -> KVFormat:
    """The geometry that all attention layers share."""
    if not layers:
        raise CompileError("the program has no attention that the compiler knows; there is nothing to page")
    first = layers[0]
    for i, spec in enumerate(layers):
        if (spec.kv_heads, spec.head_dim) != (first.kv_heads, first.head_dim):
            raise CompileError(
                f"attention layer {i} has {spec.kv_heads} KV heads of {spec.head_dim}, layer 0 has {first.kv_heads} "
                f"of {first.head_dim}; all layers of a model must share one KV geometry"
            )
    return KVFormat(
        layers=len(layers),
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        page_size=options.page_size,
        dtype=options.kv_dtype,
        k_transposed=options.k_transposed,
    )
