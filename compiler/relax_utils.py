"""What every pass over Relax needs: reading expressions, looking up definitions and uses, rebuilding a function.

The functions that passes rewrite are flat: one dataflow block of variable bindings (compiler/verify.py checks it). So a
pass is two steps: analyse the bindings, then `rebuild` the function with other expressions in some of their places.
Relax and TIR variables are one class in this TVM; `ir.is_prim_expr` tells scalars from tensors.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tvm
import tvm_ffi
from tvm import ir, relax, tirx

from tilewright.compiler.composites import load_spec
from tilewright.compiler.errors import CompileError

Expr: TypeAlias = Any  # tvm.ir.Expr: the stubs know nothing of it
Emit: TypeAlias = Callable[[Expr], Expr]

# ---------------------------------------------------------------------------------------------------------------------
# Reading expressions


def op_name(expr: Expr) -> str | None:
    """The operator's name without "relax." ("add", "nn.softmax"), or None where `expr` is no operator call."""
    if isinstance(expr, ir.Call) and isinstance(expr.op, ir.Op):
        return str(expr.op.name).removeprefix("relax.")
    return None


def is_tensor(expr: Expr) -> bool:
    """A tensor of known shape."""
    return isinstance(expr.ty, relax.TensorType) and expr.ty.shape is not None


def shape(expr: Expr) -> list[Expr]:
    """The extents of a tensor or of a shape expression."""
    return list(expr.values if isinstance(expr, relax.ShapeExpr) else expr.ty.shape.values)


def dtype(expr: Expr) -> str:
    """The dtype of a tensor, as text: "float32"."""
    return str(expr.ty.dtype)


def static(extent: Expr) -> int | None:
    """The value of a constant integer, or None where it is symbolic."""
    if isinstance(extent, tirx.IntImm):
        return int(extent.value)
    return extent if isinstance(extent, int) else None


def static_shape(expr: Expr) -> list[int | None]:
    """The extents of a tensor; None for each symbolic one."""
    return [static(e) for e in shape(expr)]


def integers(sequence: Expr) -> list[int]:
    """The values of a tuple of constant integers, as axes and slices are given."""
    items = sequence.fields if isinstance(sequence, relax.Tuple) else sequence
    values = [static(x) for x in items]
    if any(v is None for v in values):
        raise ValueError(f"{sequence} is not made of constant integers")
    return values  # type: ignore[return-value]


def scalar(expr: Expr) -> Any:
    """The Python number of a one-element constant tensor, else None."""
    if isinstance(expr, ir.GenericConst) and hasattr(expr.value, "numpy"):
        array = expr.value.numpy()
        if array.size == 1:
            return array.reshape(-1)[0].item()
    return None


def shortest(number: float) -> float:
    """The shortest decimal of the same float32: 1e-5 however it was spelt, so that equal specs are equal."""
    return float(str(np.float32(number)))


def same_extent(a: Expr, b: Expr) -> bool:
    """Whether two extents are provably equal."""
    x, y = static(a), static(b)
    if x is not None and y is not None:
        return x == y
    return (not isinstance(a, int) and a.same_as(b)) or bool(tvm.sym.Analyzer().can_prove_equal(a, b))


def same_shape(a: Sequence[Expr], b: Sequence[Expr]) -> bool:
    return len(a) == len(b) and all(same_extent(x, y) for x, y in zip(a, b, strict=True))


def symbolic_vars(expr: Expr) -> list[Expr]:
    """The variables in a scalar expression, a shape, or the shape of a tensor type."""
    if isinstance(expr, int):
        return []
    if isinstance(expr, relax.ShapeExpr):
        return [v for e in expr.values for v in symbolic_vars(e)]
    if isinstance(expr, relax.TensorType):
        return symbolic_vars(expr.shape) if expr.shape is not None else []
    return list(tirx.analysis.undefined_vars(expr))


def substitute(expr: Expr, by: Mapping[Expr, Expr]) -> Expr:
    """A scalar expression, a type, or an attribute with its variables replaced."""
    return tvm_ffi.structural_map(expr, (ir.Var, lambda v: by.get(v, v)), order="post")


def composite_of(mod: tvm.IRModule, expr: Expr) -> tuple[str, Any] | None:
    """(name, spec) where `expr` calls a composite of `mod`, else None."""
    if not (isinstance(expr, ir.Call) and isinstance(expr.op, ir.GlobalVar)):
        return None
    attrs = mod[expr.op].attrs or {}
    if "tw.composite" not in attrs:
        return None
    name = str(attrs["tw.composite"])
    return name, load_spec(name, attrs["tw.spec"])


def operands(expr: Expr) -> Iterator[Expr]:
    """The variables that `expr` reads, tuples flattened."""
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, ir.Call):
        for arg in expr.args:
            yield from operands(arg)
    elif isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from operands(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from operands(expr.tuple_value)


# ---------------------------------------------------------------------------------------------------------------------
# Functions


def main_function(mod: tvm.IRModule) -> tuple[ir.GlobalVar, relax.Function]:
    """The one public function: `forward` up to stage "fused"."""
    public = [
        (gv, f)
        for gv, f in mod.functions.items()
        if isinstance(f, relax.Function) and "global_symbol" in (f.attrs or {})
    ]
    if len(public) != 1:
        names = ", ".join(sorted(gv.name_hint for gv, _ in public)) or "none"
        raise CompileError(f"the module has {len(public)} public functions ({names}); give exactly one")
    return public[0]


def bindings(func: relax.Function) -> list[Any]:
    """All bindings of a function's body, in order."""
    return [b for block in func.body.blocks for b in block.bindings]


class Scope:
    """The definitions and uses of a function's variables."""

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.definition = {b.var: b.value for b in bindings(func)}
        self.users: dict[Any, list[Any]] = {}
        for var, value in self.definition.items():
            for x in operands(value):
                self.users.setdefault(x, []).append(var)
        for x in operands(func.body.body):
            self.users.setdefault(x, []).append(None)

    def resolve(self, expr: Expr) -> Expr:
        """The variable behind renamings (`a = b`)."""
        while isinstance(expr, relax.Var) and isinstance(self.definition.get(expr), relax.Var):
            expr = self.definition[expr]
        return expr

    def value(self, expr: Expr) -> Expr:
        """What a variable is bound to, renamings followed; a parameter or another expression is itself."""
        expr = self.resolve(expr)
        return self.definition.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def is_op(self, expr: Expr, *names: str) -> bool:
        return op_name(self.value(expr)) in names

    def args(self, expr: Expr) -> list[Expr]:
        """The arguments of the call that `expr` is bound to."""
        return list(self.value(expr).args)

    def number(self, expr: Expr) -> Any:
        """The Python number of a one-element constant behind `expr`, else None."""
        return scalar(self.value(expr))

    def without_number(self, expr: Expr, *ops: str) -> tuple[Expr, float] | None:
        """(tensor, number) where `expr` is one of the commutative `ops` on a tensor and a constant, in either order."""
        if self.is_op(expr, *ops):
            a, b = self.args(expr)
            for x, c in ((a, self.number(b)), (b, self.number(a))):
                if c is not None:
                    return x, c
        return None

    def same(self, a: Expr, b: Expr) -> bool:
        """Whether two expressions are the same value: the same variable, or the same pure computation of the same."""
        a, b = self.resolve(a), self.resolve(b)
        if a.same_as(b):
            return True
        x, y = self.value(a), self.value(b)
        if op_name(x) is None or op_name(x) != op_name(y) or len(x.args) != len(y.args):
            return x is not y and _is_literal(x) and bool(tvm_ffi.structural_equal(x, y))
        return bool(tvm_ffi.structural_equal(x.attrs, y.attrs)) and all(
            self.same(p, q) for p, q in zip(x.args, y.args, strict=True)
        )


def _is_literal(expr: Expr) -> bool:
    if isinstance(expr, relax.Tuple):
        return all(_is_literal(f) for f in expr.fields)
    return isinstance(expr, ir.GenericConst | relax.ShapeExpr | tirx.IntImm | tirx.FloatImm)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def param_entries(func: relax.Function) -> list[dict[str, Any]]:
    """The `tw.params` entries of a function, one per parameter after its inputs, in order."""
    return json.loads(str(func.attrs["tw.params"]))


def input_count(func: relax.Function) -> int:
    """How many leading parameters are inputs; the others are weights."""
    return int(func.attrs["num_input"])


def weight_params(func: relax.Function) -> list[Any]:
    return list(func.params)[input_count(func) :]


def refusals(func: relax.Function) -> dict[str, str]:
    """Why a pass did not fuse what looked like its pattern: binding -> reason, in the attribute `tw.refused`."""
    return json.loads(str(func.attrs.get("tw.refused", "{}")))


# ---------------------------------------------------------------------------------------------------------------------
# Rebuilding


class Emitter:
    """Emits expressions into a function under construction; maps the old function's variables to the new one's."""

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self.builder = builder
        self.new: dict[Any, Expr] = {}

    def __call__(self, expr: Expr, hint: str = "") -> Expr:
        """Bind `expr` (over new variables) to a new variable; an expression that is one already stays."""
        return expr if isinstance(expr, relax.Var) else self.builder.emit(expr, hint)

    def map(self, expr: Expr) -> Expr:
        """An old expression over the new variables."""
        if isinstance(expr, relax.Var):
            return self.new.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.map(f) for f in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.map(expr.tuple_value), expr.index)
        if isinstance(expr, ir.Call):
            return relax.Call(expr.op, [self.map(a) for a in expr.args], expr.attrs, expr.ty_args)
        return expr


Rule: TypeAlias = Callable[[Emitter], Expr]


def rebuild(
    mod: tvm.IRModule,
    rules: Mapping[Any, Rule],
    params: Callable[[Emitter, relax.Function], Sequence[Any]] | None = None,
    attrs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> tvm.IRModule:
    """The module with its public function emitted anew, then dead code and unused private functions removed.

    rules: for the bindings of these variables, what to emit instead (an expression over new variables); composites that
    a rule adds to `emitter.builder` land in the module. params: makes the new parameters and fills `emitter.new`; by
    default they are the old ones. attrs: replaces function attributes (None removes one). name: renames the function.
    """
    gv, func = main_function(mod)
    name = name or gv.name_hint
    builder = relax.BlockBuilder(tvm.IRModule({g: f for g, f in mod.functions.items() if g != gv}))
    emitter = Emitter(builder)
    new_params = params(emitter, func) if params else _copy_params(emitter, func.params)
    new_attrs = {k: v for k, v in {**func.attrs, **(attrs or {})}.items() if k != "global_symbol" and v is not None}
    output = None
    with builder.function(name, new_params, attrs=new_attrs):
        with builder.dataflow():
            for binding in bindings(func):
                rule = rules.get(binding.var)
                value = rule(emitter) if rule else emitter.map(binding.value)
                if binding.var.same_as(func.body.body):
                    output = builder.emit_output(value, binding.var.name)
                else:
                    emitter.new[binding.var] = emitter(value, binding.var.name)
            if output is None:  # the function returns a parameter
                output = builder.emit_output(emitter.map(func.body.body))
        builder.emit_func_output(output)
    return remove_dead_code(builder.get(), name)


def _copy_params(emitter: Emitter, params: Iterable[Any]) -> list[Any]:
    fresh = [relax.Var(p.name, p.ty) for p in params]
    emitter.new.update(zip(params, fresh, strict=True))
    return fresh


def remove_dead_code(mod: tvm.IRModule, *entries: str) -> tvm.IRModule:
    return relax.transform.DeadCodeElimination(list(entries))(mod)
