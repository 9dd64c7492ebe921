"""Plain operators: what no composite took stays TVM's own, fused into small functions that a step calls.

Casts and angles of positions, gathered rows, and a residual's addition where a norm stands between it and its linear
are such. Reshapes are none: they move no data.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright.compiler.calls import bounds_of
from tilewright.compiler.codegen.held_calls import hold_calls, release_calls
from tilewright.compiler.relax_utils import bindings, op_name

STEP = "step"  # the general step's name; the others' begin with it


@dataclass(frozen=True)
class Operator:
    """A plain operator of steps. func: its PrimFunc, whose last parameters are the results. shapes, dtypes: of the
    parameters, with the largest extents that steps call it with. inputs: how many of them are arguments. symbol: of its
    first result's leading extent, "" where that is static. calls: how often each function calls it."""

    name: str
    func: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    inputs: int
    symbol: str
    calls: Mapping[str, int]

    @property
    def rows(self) -> int:
        """The first result's leading extent."""
        return (*self.shapes[self.inputs], 1)[0]


def fuse(mod: Any) -> Any:
    """A scheduled module whose plain operators are fused into PrimFuncs. Under TVM's target for the machine."""
    import tvm
    from tvm.relax import transform

    passes = [
        transform.BundleModelParams("weights"),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
    ]
    return release_calls(tvm.transform.Sequential(passes)(hold_calls(mod)))


def operators(fused: Any) -> list[Operator]:
    """The plain operators that the steps of a fused module call, by name. One that takes anything but tensors, or whose
    extents are no plain numbers or bounded ones, is left out."""
    from tvm import relax

    mod = relax.transform.RewriteDataflowReshape()(fused)
    calls: dict[str, Counter[str]] = {}
    found: dict[str, Operator] = {}
    for gvar, step in mod.functions.items():
        function = gvar.name_hint
        if not isinstance(step, relax.Function) or not (function == STEP or function.startswith(f"{STEP}_")):
            continue
        for binding in bindings(step):
            if op_name(binding.value) != "call_tir":
                continue
            name = binding.value.args[0].name_hint
            made = _operator(name, fused[name], binding, bounds_of(step))
            if made is not None:
                calls.setdefault(name, Counter())[function] += 1
                known = found.get(name, made)
                found[name] = known if known.rows >= made.rows else made
    return [Operator(**{**vars(found[name]), "calls": dict(calls[name])}) for name in sorted(found)]


def _operator(name: str, func: Any, binding: Any, bounds: Mapping[str, int]) -> Operator | None:
    """The operator as one call has it."""
    from tvm import relax

    arguments = list(binding.value.args[1].fields)
    results = list(binding.var.ty.fields) if isinstance(binding.var.ty, relax.TupleType) else [binding.var.ty]
    types = [*(argument.ty for argument in arguments), *results]
    shapes = [_extents(ty, bounds) for ty in types]
    if len(types) != len(func.params) or any(shape is None for shape in shapes):
        return None
    leading = next(iter(results[0].shape.values), None)
    symbol = "" if leading is None or hasattr(leading, "value") else leading.name
    sizes = tuple(shape for shape in shapes if shape is not None)
    return Operator(name, bare(func), sizes, tuple(str(ty.dtype) for ty in types), len(arguments), symbol, {})


def _extents(ty: Any, bounds: Mapping[str, int]) -> tuple[int, ...] | None:
    values = getattr(getattr(ty, "shape", None), "values", None)
    if values is None:
        return None
    found = [int(v.value) if hasattr(v, "value") else bounds.get(getattr(v, "name", "")) for v in values]
    return None if None in found else tuple(n for n in found if n is not None)


def bare(func: Any) -> Any:
    """A PrimFunc without what the passes noted on it, so that equal computations are equal."""
    return func.without_attr("op_pattern").without_attr("global_symbol")


def structural_hash(func: Any) -> str:
    """Of a PrimFunc's computation, whatever its variables are called: 64 bits in hexadecimal, the same everywhere."""
    import tvm_ffi

    return f"{tvm_ffi.structural_hash(func.with_attr('global_symbol', 'main')) & 0xFFFF_FFFF_FFFF_FFFF:016x}"


def fixed(func: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
    """The PrimFunc with static extents."""
    from tvm import tirx

    def buffer(param: Any, shape: tuple[int, ...]) -> Any:
        return tirx.decl_buffer([tirx.IntImm("int64", n) for n in shape], param.dtype, param.name)

    return func.specialize({p: buffer(p, shape) for p, shape in zip(func.params, shapes, strict=True)})


def apply_trace(func: Any, instructions: str) -> Any:
    """The PrimFunc after the instructions of a MetaSchedule trace, as JSON. Raises whatever TVM does where they
    don't fit it."""
    from tvm import s_tir

    schedule = s_tir.Schedule(alone(func))
    s_tir.schedule.Trace.apply_json_to_schedule(json.loads(instructions), schedule)
    return schedule.mod["main"].without_attr("global_symbol")


def alone(func: Any) -> Any:
    """A module of a copy of the PrimFunc, as "main": a Schedule of TVM changes the loops that it is given in place."""
    import tvm

    copied = tvm.ir.load_json(tvm.ir.save_json(func))
    return tvm.IRModule({"main": copied.with_attr("global_symbol", "main")})


def replaced(mod: Any, functions: Mapping[str, Any]) -> Any:
    """The module with other PrimFuncs in the place of those named."""
    import tvm

    return tvm.IRModule({g: functions.get(g.name_hint, f) for g, f in mod.functions.items()}, mod.attrs)
