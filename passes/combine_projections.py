"""Linears on one input become one linear on their weights' rows joined."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from tilewright.compiler.bodies import add_composite
from tilewright.compiler.composites import LinearSpec
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Rule,
    Scope,
    composite_of,
    input_count,
    main_function,
    param_entries,
    rebuild,
    weight_params,
)
from tilewright.compiler.views import simplify_views


@dataclass(frozen=True)
class CombineProjections(Pass):
    """Join the linears of q, k, v, and those of gate and up: the input is read once, and one kernel does the work.

    before   forward(.., q[N,K], k[M,K]):   a = linear(x, q);  b = linear(x, k)
    after    forward(.., qk[N+M,K]):        y = linear(x, qk);  a = y[:, :N];  b = y[:, N:]

    `formats` says how each source tensor is stored ("f32" where it is not named): only weights of one format join. A
    weight that is used elsewhere too, or that has a bias where others have none, stays out. In `tw.params` the joined
    parameter's sources are those of its parts, in row order.
    """

    formats: tuple[tuple[str, str], ...] = ()

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        groups = _Finder(mod, func, dict(self.formats)).groups()
        rules: dict[Any, Rule] = {}
        for group in groups:
            rules |= group.rules()
        entries = _joined_entries(func, groups)
        params = _Parameters(groups)
        return simplify_views(rebuild(mod, rules, params=params, attrs={"tw.params": json.dumps(entries)}))


@dataclass(frozen=True)
class _Projection:
    """y = linear(x, weight, (bias)), its parameters used nowhere else."""

    result: Any
    x: Expr
    weight: Any
    bias: Any | None
    spec: LinearSpec


@dataclass(frozen=True)
class _Group:
    """Projections to join, in the order of the function, and the names of the joined weight and bias."""

    members: tuple[_Projection, ...]
    weight_name: str
    bias_name: str

    @property
    def rows(self) -> int:
        return sum(m.spec.out_features for m in self.members)

    def rules(self) -> dict[Any, Rule]:
        """The first member makes the joined linear; each takes its columns."""
        joined: list[Expr] = []
        rules, begin = {}, 0
        for member in self.members:
            rules[member.result] = self._slice(joined, begin, begin + member.spec.out_features)
            begin += member.spec.out_features
        return rules

    def _slice(self, joined: list[Expr], begin: int, end: int) -> Rule:
        def emit(emitter: Emitter) -> Expr:
            if not joined:
                joined.append(emitter(self._linear(emitter)))
            return relax.op.strided_slice(joined[0], [1], [begin], [end])

        return emit

    def _linear(self, emitter: Emitter) -> Expr:
        first = self.members[0]
        spec = LinearSpec(self.rows, first.spec.in_features, bias=first.bias is not None)
        args = [emitter.map(a) for a in (first.x, first.weight, first.bias) if a is not None]
        return relax.Call(add_composite(emitter.builder, "linear", spec), args)


class _Finder:
    """Finds the groups of one function."""

    def __init__(self, mod: tvm.IRModule, func: relax.Function, formats: dict[str, str]) -> None:
        self.mod, self.scope = mod, Scope(func)
        entries = param_entries(func)
        self.entry = dict(zip(weight_params(func), entries, strict=True))
        self.format = {p: {formats.get(s, "f32") for s in e["sources"]} for p, e in self.entry.items()}

    def groups(self) -> list[_Group]:
        found: dict[Any, list[_Projection]] = {}
        for var, value in self.scope.definition.items():
            projection = self._projection(var, value)
            if projection is not None:
                stored = min(self.format[projection.weight])
                key = (projection.x, stored, projection.bias is not None)
                found.setdefault(key, []).append(projection)
        return [self._group(tuple(members)) for members in found.values() if len(members) > 1]

    def _group(self, members: tuple[_Projection, ...]) -> _Group:
        def joined(params: Sequence[Any]) -> str:
            return join_names([self.entry[p]["name"] for p in params])

        biases = [m.bias for m in members if m.bias is not None]
        return _Group(members, joined([m.weight for m in members]), joined(biases) if biases else "")

    def _projection(self, var: Any, value: Expr) -> _Projection | None:
        composite = composite_of(self.mod, value)
        if composite is None or composite[0] != "linear":
            return None
        spec = composite[1]
        plain = LinearSpec(spec.out_features, spec.in_features, bias=spec.bias)
        x, *params = (self.scope.resolve(a) for a in value.args)
        if spec != plain or not all(self._is_own(p) for p in params) or len(self.format[params[0]]) > 1:
            return None
        return _Projection(var, x, params[0], params[1] if spec.bias else None, spec)

    def _is_own(self, param: Any) -> bool:
        return param in self.entry and len(self.scope.users.get(param, [])) == 1


def join_names(names: Sequence[str]) -> str:
    """layers.0.attn.q, .k, .v -> layers.0.attn.qkv; layers.0.mlp.gate, .up -> layers.0.mlp.gate_up; .bias stays"""
    suffix = ".bias" if all(n.endswith(".bias") for n in names) else ""
    split = [n.removesuffix(suffix).rpartition(".") for n in names]
    prefix, dot, _ = split[0]
    words = [last if head == prefix else f"{head}{mark}{last}" for head, mark, last in split]
    return prefix + dot + ("" if all(len(w) == 1 for w in words) else "_").join(words) + suffix


def _joined_entries(func: relax.Function, groups: list[_Group]) -> list[dict[str, Any]]:
    """The function's tw.params with each group's entries in one, in the place of its first."""
    entries = dict(zip(weight_params(func), param_entries(func), strict=True))
    for group in groups:
        for name, params in _joined_params(group):
            parts = [entries.pop(p) for p in params[1:]]
            first = entries[params[0]]
            sources = [s for part in (first, *parts) for s in part["sources"]]
            entries[params[0]] = {**first, "name": name, "sources": sources, "shape": [group.rows, *first["shape"][1:]]}
    return list(entries.values())


def _joined_params(group: _Group) -> list[tuple[str, list[Any]]]:
    weights = [(group.weight_name, [m.weight for m in group.members])]
    biases = [m.bias for m in group.members if m.bias is not None]
    return weights + ([(group.bias_name, biases)] if biases else [])


@dataclass(frozen=True)
class _Parameters:
    """Makes the parameters of the rebuilt function."""

    groups: list[_Group]

    def __call__(self, emitter: Emitter, func: relax.Function) -> list[Any]:
        renamed: dict[Any, tuple[str, int]] = {}
        dropped: set[Any] = set()
        for group in self.groups:
            for name, (first, *others) in _joined_params(group):
                renamed[first] = (name.replace(".", "_"), group.rows)
                dropped.update(others)
        params = []
        for k, old in enumerate(func.params):
            if k >= input_count(func) and old in dropped:
                continue
            new = relax.Var(old.name, old.ty)
            if old in renamed:
                name, rows = renamed[old]
                new = relax.Var(name, relax.TensorType([rows, *old.ty.shape.values[1:]], old.ty.dtype))
            emitter.new[old] = new
            params.append(new)
        return params
