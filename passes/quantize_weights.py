"""Weights take the packed layout that kernels read."""

import json
from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import relax

from tilewright.compiler.errors import CompileError
from tilewright.compiler.packed_weights import packed_dtype, packed_shape
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Rule,
    Scope,
    bindings,
    composite_of,
    main_function,
    op_name,
    param_entries,
    rebuild,
    weight_params,
)
from tilewright.compiler.served_bodies import add_served_composite

_WEIGHT_ARGUMENT = {"linear": 1, "embedding": 0}


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Give every weight of a linear or an embedding its format. Stage "served".

    before   w: R.Tensor((N, K), "float32")          tw.params {"name": "w", "shape": [N, K], "format": "f32"}
             y = linear(x, w)                        # spec weight_format "f32"
    after    w: R.Tensor((P, K // 32, 320), "uint8")    tw.params {"name": "w", "shape": [N, K], "format": "q4_1"}
             y = linear1(x, w)                       # spec weight_format "q4_1"; its body dequantises

    formats: (checkpoint tensor, format), for every weight concerned; the tensors joined in one parameter must agree.
    narrow: checkpoint tensors in block formats whose linear may round activations to 8 bits; all others keep 16.
    Dense weights are packed as well (compiler/packed_weights.py has the layouts); norm weights and biases stay as they
    are. Raises CompileError for a weight without a format, or one that another operator reads too.
    """

    formats: tuple[tuple[str, str], ...]
    narrow: tuple[str, ...] = ()

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        entries = dict(zip(weight_params(func), param_entries(func), strict=True))
        calls = {
            b.var: (*found, b.value.args)
            for b in bindings(func)
            if (found := composite_of(mod, b.value)) is not None and found[0] in _WEIGHT_ARGUMENT
        }
        weights = {args[_WEIGHT_ARGUMENT[name]] for name, _, args in calls.values()}
        _check_readers(mod, func, weights, calls, entries)
        formats = {weight: self._format(entries[weight]) for weight in weights}
        new_entries = [e | {"format": formats[p]} if p in formats else e for p, e in entries.items()]

        def params(emitter: Emitter, func: relax.Function) -> list[Any]:
            fresh = [_retyped(p, entries[p]["shape"], formats[p]) if p in formats else _copy(p) for p in func.params]
            emitter.new.update(zip(func.params, fresh, strict=True))
            return fresh

        def rule(name: str, spec: Any, args: list[Expr]) -> Rule:
            weight = args[_WEIGHT_ARGUMENT[name]]
            packed = replace(spec, weight_format=formats[weight], **self._activations(name, entries[weight]))
            return lambda emitter: relax.Call(
                add_served_composite(emitter.builder, name, packed), [emitter.map(a) for a in args]
            )

        return rebuild(
            _without_plain_forms(mod),
            {var: rule(*call) for var, call in calls.items()},
            params=params,
            attrs={"tw.params": json.dumps(new_entries)},
        )

    def _activations(self, composite: str, entry: dict[str, Any]) -> dict[str, int]:
        """The field that says how wide a linear's activations are, where it is not the default."""
        return {"activation_bits": 8} if composite == "linear" and set(entry["sources"]) <= set(self.narrow) else {}

    def _format(self, entry: dict[str, Any]) -> str:
        """The format that all checkpoint tensors of a parameter have."""
        known = dict(self.formats)
        missing = [s for s in entry["sources"] if s not in known]
        if missing:
            raise CompileError(f"weight {missing[0]!r} has no format; name one for every linear and embedding weight")
        found = {s: known[s] for s in entry["sources"]}
        if len(set(found.values())) != 1:
            raise CompileError(
                f"parameter {entry['name']!r} joins tensors of several formats, {found}; join those of one format only"
            )
        return next(iter(found.values()))


def _check_readers(
    mod: tvm.IRModule, func: relax.Function, weights: set[Any], calls: dict[Any, Any], entries: dict[Any, Any]
) -> None:
    """Each weight is a parameter, and nothing but linears and embeddings reads it."""
    scope = Scope(func)
    for weight in weights:
        if weight not in entries:
            raise CompileError(f"weight {weight.name} of a linear is computed; only a parameter can be packed")
        for user in scope.users[weight]:
            if user not in calls:
                what = "the output" if user is None else f"operator {op_name(scope.definition[user])}"
                raise CompileError(f"weight {weight.name} is packed for a linear, but {what} reads it as well")


def _without_plain_forms(mod: tvm.IRModule) -> tvm.IRModule:
    """The module less its linears and embeddings: a packed "f32" has the same spec as the plain one it replaces."""
    return tvm.IRModule(
        {g: f for g, f in mod.functions.items() if (f.attrs or {}).get("tw.composite") not in _WEIGHT_ARGUMENT}
    )


def _copy(param: Any) -> Any:
    return relax.Var(param.name, param.ty)


def _retyped(param: Any, shape: list[int], weight_format: str) -> Any:
    return relax.Var(param.name, relax.TensorType(packed_shape(weight_format, *shape), packed_dtype(weight_format)))
