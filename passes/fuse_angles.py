"""Cosines and sines of positions become one composite."""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import ir, relax

from tilewright.compiler.composites import AnglesSpec
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import Emitter, Expr, Rule, Scope, main_function, rebuild, static_shape
from tilewright.compiler.served_bodies import add_served_composite


@dataclass(frozen=True)
class FuseAngles(Pass):
    """Find the tables that rotations read. Stage "served", for GPUs, where each operator is a launch.

    before   a = reshape(astype(positions), [t, 1]) * frequencies        # frequencies[D/2] or [1, D/2], constant
             c, s = cos(a), sin(a)
    after    both = angles(positions, frequencies)
             c, s = both[0], both[1]

    Casts between integers may stand before the one to float32. Angles that are made in another way stay as they are.
    """

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        scope = Scope(func)
        rules: dict[Any, Rule] = {}
        for angles in [var for var in scope.definition if scope.is_op(var, "multiply")]:
            found = _match(scope, angles)
            users = {var: scope.value(var) for var in scope.users.get(angles, []) if var is not None}
            turned = {var: index for var in users for index, op in enumerate(("cos", "sin")) if scope.is_op(var, op)}
            if found is not None and turned:
                table = _Table(*found)
                rules |= {var: table.rule(index) for var, index in turned.items()}
        return rebuild(mod, rules)


def _match(scope: Scope, angles: Expr) -> tuple[Expr, Expr] | None:
    """(positions i32[t], frequencies f32[D/2] as a constant) where `angles` are their products."""
    for column, row in (scope.args(angles), reversed(scope.args(angles))):
        frequencies, positions = scope.value(row), _positions(scope, column)
        if positions is not None and isinstance(frequencies, ir.GenericConst):
            values = frequencies.value.numpy()
            if values.dtype == "float32" and values.size == values.shape[-1] > 1:
                return positions, relax.const(values.reshape(-1))
    return None


def _positions(scope: Scope, column: Expr) -> Expr | None:
    """i32[t], of which `column` is the float32 values as [t, 1]."""
    if static_shape(column) != [None, 1] or str(column.ty.dtype) != "float32":
        return None
    while scope.is_op(column, "reshape", "expand_dims", "astype"):
        column = scope.resolve(scope.args(column)[0])
        integers = ("int32", "int64")
        if str(column.ty.dtype) not in (*integers, "float32"):
            return None
    return column if str(column.ty.dtype) == "int32" and static_shape(column) == [None] else None


class _Table:
    """The composite's call, which the rules of its users share."""

    def __init__(self, positions: Expr, frequencies: Expr) -> None:
        self._positions, self._frequencies = positions, frequencies
        self._call: Expr = None

    def rule(self, index: int) -> Rule:
        def emit(emitter: Emitter) -> Expr:
            if self._call is None:
                spec = AnglesSpec(2 * self._frequencies.value.numpy().size)
                function = add_served_composite(emitter.builder, "angles", spec)
                call = relax.Call(function, [emitter.map(self._positions), self._frequencies])
                self._call = emitter(call, "angles")
            return relax.TupleGetItem(self._call, index)

        return emit
