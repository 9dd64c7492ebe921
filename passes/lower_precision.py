"""Activations in 16 bits: what composites read and write, float32 within."""

from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import ir, relax

from tilewright.compiler.bodies import add_composite, cast
from tilewright.compiler.errors import CompileError
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Rule,
    bindings,
    composite_of,
    dtype,
    is_tensor,
    main_function,
    op_name,
    rebuild,
    shape,
)
from tilewright.compiler.served_bodies import BODIES, add_served_composite

# Plain operators that move values and compute nothing: they take any dtype.
_MOVES = frozenset(["concat", "expand_dims", "permute_dims", "reshape", "split", "squeeze", "strided_slice", "take"])


@dataclass(frozen=True)
class LowerPrecision(Pass):
    """Give activations a 16-bit dtype. Stage "served", after fuse_linear_neighbours, before lower_sampling.

    before   h = rms_norm(x, g)                    # float32[t, K]
             y = linear(h, w)
             return linear1(y, head)
    after    h = rms_norm1(x, g)                   # bfloat16[t, K], spec dtype
             y = linear2(h, w)                     # spec dtype, out_dtype
             return linear3(y, head)               # out_dtype float32: the sampler's logits

    A composite computes in float32 on what it reads and rounds once, what it writes. Plain operators that compute do so
    in float32 as well, and round what they made of 16-bit values. Norm weights, biases and angles stay float32.
    """

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16"):
            raise CompileError(f"activation dtype {self.dtype!r} is neither bfloat16 nor float16")

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        found = {b.var: f for b in bindings(func) if (f := composite_of(mod, b.value)) is not None}
        linears = [var for var, (name, _) in found.items() if name == "linear"]
        rules: dict[Any, Rule] = {}
        for binding in bindings(func):
            var, value = binding.var, binding.value
            if var in found:
                rules[var] = self._composite(value, *found[var], logits=bool(linears) and var.same_as(linears[-1]))
            elif var.same_as(func.body.body):
                rules[var] = self._output(value)
            elif op_name(value) is not None and op_name(value) not in _MOVES and is_tensor(var):
                rules[var] = self._plain(value)
        return rebuild(mod, rules)

    def _composite(self, call: Expr, name: str, spec: Any, logits: bool) -> Rule:
        changes = {field: self.dtype for field in ("dtype", "out_dtype") if hasattr(spec, field)}
        if logits:
            changes["out_dtype"] = "float32"
        lowered = replace(spec, **changes)

        def emit(emitter: Emitter) -> Expr:
            if name in BODIES:
                function = add_served_composite(emitter.builder, name, lowered)
            else:
                function = add_composite(emitter.builder, name, lowered, rank=len(shape(call.args[0])))
            params = emitter.builder.get()[function].params
            args = [_matching(emitter, emitter.map(a), p) for a, p in zip(call.args, params, strict=True)]
            return relax.Call(function, args)

        return emit

    def _plain(self, call: Expr) -> Rule:
        def emit(emitter: Emitter) -> Expr:
            args = [emitter.map(a) for a in call.args]
            if not any(self._is_activation(a) for a in args):
                return emitter.map(call)
            wide = [cast(emitter, a, "float32") if self._is_activation(a) else a for a in args]
            return cast(emitter, emitter(ir.Call(call.op, wide, call.attrs, call.ty_args)), self.dtype)

        return emit

    def _output(self, value: Expr) -> Rule:
        def emit(emitter: Emitter) -> Expr:
            mapped = emitter.map(value)
            if isinstance(mapped, relax.Tuple):
                return relax.Tuple([cast(emitter, f, "float32") for f in mapped.fields])
            return mapped

        return emit

    def _is_activation(self, expr: Expr) -> bool:
        return is_tensor(expr) and dtype(expr) == self.dtype


def _matching(emitter: Emitter, arg: Expr, param: Any) -> Expr:
    """The argument in the dtype that a function's parameter has."""
    if not (is_tensor(arg) and is_tensor(param)) or dtype(arg) == dtype(param):
        return arg
    return cast(emitter, arg, dtype(param))
