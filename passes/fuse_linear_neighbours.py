"""Norms, gates and residuals join the linear beside them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import tvm
from tvm import relax

from tilewright.compiler.composites import LinearSpec
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
    rebuild,
    same_shape,
    shape,
)
from tilewright.compiler.served_bodies import add_served_composite


@dataclass(frozen=True)
class FuseLinearNeighbours(Pass):
    """Put what surrounds a linear into its spec. Stage "served", after quantize_weights.

    before   h = rms_norm(x, g)
             y = linear(h, w, b)
             z = add(x, y)
    after    z = linear1(x, w, g, b, x)       # spec: norm, residual

    before   h = gated(u)
             y = linear(h, w)
    after    y = linear1(u, w)                # spec: gated

    before   y = linear(x, w)                                     with gate_after
             z = gated(y)
    after    z = linear1(x, w)                # spec: gate

    gate_after: a gate joins the linear before it: for targets whose matrix kernels read x many times but hold every
    product once. takes_norm: which linears a norm may join; all others leave it a kernel of its own.

    A norm goes into each of the linears that read it, if nothing else reads it; a gate into the one that does. A linear
    that is read only by an addition takes the other operand, of its own shape, as its residual.
    """

    gate_after: bool = False
    takes_norm: Callable[[LinearSpec], bool] = lambda spec: True

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        scope = Scope(func)
        composites = {b.var: found for b in bindings(func) if (found := composite_of(mod, b.value)) is not None}
        linears = {v: _Linear(s, list(scope.args(v))) for v, (name, s) in composites.items() if name == "linear"}
        ends: dict[Any, Any] = {}  # binding that gets the linear's result -> linear
        for var, (name, spec) in composites.items():
            if name == "gated" and self.gate_after:
                _take_gate(scope, linears, var, spec, ends)
            elif name in ("rms_norm", "gated"):
                self._take_prologue(scope, linears, var, name, spec)
        for binding in bindings(func):
            if op_name(binding.value) == "add":
                self._take_residual(scope, linears, binding, ends)
        absorbed = {linear: add for add, linear in ends.items()}
        rules = {absorbed.get(v, v): linear.rule() for v, linear in linears.items() if linear.changed}
        return rebuild(mod, rules)

    def _take_prologue(self, scope: Scope, linears: dict[Any, "_Linear"], var: Any, name: str, spec: Any) -> None:
        """Move a norm or a gate into the linears that read it, if they are all that reads it and read it as their x."""
        readers = scope.users.get(var, [])
        change = {"norm" if name == "rms_norm" else "gated": spec}
        fits = bool(readers) and all(
            r in linears
            and linears[r].args[0].same_as(var)
            and linears[r].spec.norm is linears[r].spec.gated is None
            and (name == "gated" or self.takes_norm(replace(linears[r].spec, **change)))
            for r in readers
        )
        if not fits or (name == "gated" and len(readers) > 1):
            return
        x, *weight = scope.args(var)
        for reader in readers:
            linear = linears[reader]
            linear.spec = replace(linear.spec, **change)
            linear.args[0], linear.norm_weight = x, weight

    def _take_residual(self, scope: Scope, linears: dict[Any, "_Linear"], add: Any, ends: dict[Any, Any]) -> None:
        """Make an addition the end of a linear that it alone reads; the later operand first, as in x + f(x)."""
        left, right = add.value.args
        for var, other in ((right, left), (left, right)):
            linear = linears.get(var)
            if linear is None or linear.spec.residual or len(scope.users[var]) != 1 or left.same_as(right):
                continue
            spec = replace(linear.spec, residual=True)
            if same_shape(shape(other), shape(var)) and (spec.norm is None or self.takes_norm(spec)):
                linear.spec, linear.residual = spec, [other]
                ends[add.var] = var
                return


@dataclass
class _Linear:
    """A linear under change: its spec, its arguments in the old function, and what has joined."""

    spec: LinearSpec
    args: list[Expr]  # x, weight, [bias]
    norm_weight: list[Expr] = field(default_factory=list)
    residual: list[Expr] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return self.spec.residual or any(s is not None for s in (self.spec.norm, self.spec.gated, self.spec.gate))

    def rule(self) -> Rule:
        x, weight, *bias = self.args

        def emit(emitter: Emitter) -> Expr:
            function = add_served_composite(emitter.builder, "linear", self.spec)
            args = [x, weight, *self.norm_weight, *bias, *self.residual]
            return relax.Call(function, [emitter.map(a) for a in args])

        return emit


def _take_gate(scope: Scope, linears: dict[Any, _Linear], var: Any, spec: Any, ends: dict[Any, Any]) -> None:
    """Make a gate the end of the linear that it alone reads."""
    (x,) = scope.args(var)
    if x in linears and len(scope.users[x]) == 1:
        linears[x].spec = replace(linears[x].spec, gate=spec)
        ends[var] = x
