"""Every composite call becomes kernel calls: the first schedule in the order that matches, with the best known tile."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, relax

from tilewright.compiler.calls import ByRows, Call, Part, bounds_of, call_of, rows_extents
from tilewright.compiler.composites import dump_spec
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import bindings

logger = logging.getLogger(__name__)

_EMPTY = tvm.tirx.PrimFunc([], tvm.tirx.Evaluate(0))  # stands for a kernel


@dataclass(frozen=True)
class ApplySchedules(Pass):
    """Lower composites to kernels.

    before   y = linear0(x, w)                                   # private function with tw.composite, tw.spec
    after    y = R.call_dps_packed("linear_q4_gemv_1f0c…", (x, w), out_ty=R.Tensor((1, N), "float32"))
             @T.prim_func linear_q4_gemv_1f0c…                   # attributes tw.kernel = {schedule, tile, floor, …}

    A kernel is named after its content, so equal calls share one and a cache can key on the name. Kernels stay in the
    module until code generation takes them out. `choose(call)` picks schedule and tile (schedules/order.py). A deferred
    kernel is an empty function here, whose attribute tw.call says what to ask `choose` again for it, and its content is
    that of its key. Where the number of rows decides between several, the one called is an empty function whose
    attribute tw.by_rows lists them: [[most rows, name], ...], with no name where nothing is launched.
    """

    choose: Callable[[Call], Any]

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        lowering = _Lowerer(self, mod)
        functions: dict[Any, Any] = {}
        for gvar, func in mod.functions.items():
            if isinstance(func, relax.Function) and "tw.composite" not in (func.attrs or {}):
                functions[gvar] = lowering.lower(func)
        functions |= lowering.references() | lowering.kernels
        return tvm.IRModule(functions, mod.attrs)


class _Lowerer:
    """Lowers functions of one module, sharing kernels between them."""

    def __init__(self, options: ApplySchedules, mod: tvm.IRModule):
        self.mod = mod
        self.choose = options.choose
        self.kernels: dict[str, Any] = {}
        self._chosen: dict[Any, tuple[Any, list[str]] | None] = {}
        self._by_body: set[Any] = set()
        self._shared: dict[tuple[Any, ...], list[Any]] = {}  # results of shared kernels in the function at hand
        self._decode = False  # whether that function only decodes

    def lower(self, func: relax.Function) -> relax.Function:
        self._decode = bool((func.attrs or {}).get("tw.decode", False))
        bounds = bounds_of(func)
        outer = self
        self._shared = {}
        # Here and not in the visitor below: an exception that passes through TVM comes out as another class.
        for binding in bindings(func):
            if self.is_composite(binding.value):
                self.choice(binding.value, bounds)

        @relax.expr_functor.mutator
        class Rewrite(relax.PyExprMutator):
            def visit_call_(self, call: ir.Call) -> Any:
                call = super().visit_call_(call)
                return outer.emit(self.builder_, call, bounds) if outer.is_composite(call) else call

        return Rewrite(self.mod).visit_expr(func).with_attr("tw.stage", "scheduled")

    def is_composite(self, call: Any) -> bool:
        if not isinstance(call, ir.Call) or not isinstance(call.op, ir.GlobalVar):
            return False
        return "tw.composite" in (self.mod[call.op].attrs or {})

    def choice(self, call: ir.Call, bounds: dict[str, int]) -> tuple[Any, list[str]] | None:
        """How a composite call is lowered, and its kernels' names; None: by its body. Raises what `choose` does."""
        asked = call_of(self.mod, call, bounds, self._decode)
        if asked not in self._chosen:
            self._chosen[asked] = self._choose(asked)
        return self._chosen[asked]

    def references(self) -> dict[Any, Any]:
        """The composites that run by their bodies, and the TIR that bodies call."""
        if not self._by_body:
            return {}
        return {g: f for g, f in self.mod.functions.items() if g in self._by_body or not isinstance(f, relax.Function)}

    def emit(self, builder: Any, call: ir.Call, bounds: dict[str, int]) -> Any:
        choice = self.choice(call, bounds)
        if choice is None:
            self._by_body.add(call.op)
            return call
        lowering, names = choice
        rows = rows_extents(self.mod, call)[0]
        values: dict[str, Any] = {}

        def value(ref: int | str) -> Any:
            return call.args[ref] if isinstance(ref, int) else values[ref]

        for kernel, name in zip(lowering.kernels, names, strict=True):
            inputs = tuple(value(i) for i in kernel.inputs)
            if not name:
                values[kernel.outputs[0].name] = inputs[0]
                continue
            parts = self._shared.get((name, inputs)) if kernel.shared else None
            if parts is None:
                parts = _launch(builder, name, inputs, kernel.outputs, rows)
            if kernel.shared:
                self._shared[name, inputs] = parts
            values |= {out.name: part for out, part in zip(kernel.outputs, parts, strict=True)}
        results = [value(r) for r in lowering.results]
        return results[0] if len(results) == 1 else relax.Tuple(results)

    def _choose(self, asked: Call) -> tuple[Any, list[str]] | None:
        choice = self.choose(asked)
        if choice is None:
            return None
        kernels = choice.lowering.kernels
        names: list[str] = []
        for index, kernel in enumerate(kernels):
            # The floor is the whole call's; its last kernel, which does the work, carries it.
            floor = dataclasses.asdict(choice.floor) if kernel is kernels[-1] else None
            if isinstance(kernel.func, ByRows):
                listed = [(p.rows, p.func and self._add(asked, choice, index, p, None)) for p in kernel.func.parts]
                parts = [[rows, name or ""] for rows, name in listed]
                names.append(self._add_by_rows(asked, choice, parts, floor))
            elif kernel.func is None:
                names.append("")
            else:
                part = Part(asked.m_max, kernel.func, choice.tile, choice.record.place if choice.record else "")
                names.append(self._add(asked, choice, index, part, floor))
        logger.debug("%s %s -> %s", asked.composite, choice.facts, names)
        return choice.lowering, names

    def _add(self, asked: Call, choice: Any, index: int, part: Part, floor: Any) -> str:
        """A kernel of the module; its name."""
        schedule, content, func = choice.schedule.name, part.content or _content(part.func), part.func
        name = f"{schedule}_{content[:12]}"
        if name in self.kernels and floor is None:
            return name
        attrs = {"global_symbol": name, "tw.content": content, "tw.kernel": _about(asked, choice, part, floor)}
        if part.content:
            spec = dump_spec(asked.spec)
            fields = (asked.m, asked.m_max, asked.inner, asked.decode, part.rows)
            attrs["tw.call"] = json.dumps([schedule, index, asked.composite, spec, *fields])
            func = _EMPTY
        self.kernels[name] = func.with_attrs(attrs)
        return name

    def _add_by_rows(self, asked: Call, choice: Any, parts: list[list[Any]], floor: Any) -> str:
        """What calls one of several kernels of the module; its name."""
        listed = json.dumps(parts)
        content = hashlib.sha256(listed.encode()).hexdigest()[:16]
        name = f"{choice.schedule.name}_by_rows_{content[:12]}"
        about = _about(asked, choice, Part(asked.m_max, None, None), floor)
        attrs = {"global_symbol": name, "tw.content": content, "tw.kernel": about, "tw.by_rows": listed}
        self.kernels[name] = _EMPTY.with_attrs(attrs)
        return name


def _about(asked: Call, choice: Any, part: Part, floor: Any) -> str:
    """What the manifest says of a kernel."""
    about = {
        "schedule": choice.schedule.name,
        "composite": asked.composite,
        "rows": asked.m,
        "max_rows": part.rows,
        "tile": None if part.tile is None else dataclasses.asdict(part.tile),
        "floor": floor,
        **({"record": part.record} if part.record else {}),
    }
    return json.dumps(about, sort_keys=True)


def _launch(builder: Any, name: str, inputs: Sequence[Any], outputs: Sequence[Any], rows: Any) -> list[Any]:
    """Emits a kernel's call; its outputs, where "m" is `rows`."""
    types = [relax.TensorType([rows if d == "m" else d for d in out.shape], out.dtype) for out in outputs]
    result = builder.emit(relax.op.call_dps_packed(name, list(inputs), out_ty=types))
    return [result] if len(types) == 1 else [builder.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]


def _content(func: Any) -> str:
    """A hash of the kernel's IR, 64 bits in hexadecimal, that does not depend on the symbol it was given.

    TVM's structural hash is the same in every process; its tuning databases are keyed by it.
    """
    return f"{tvm_ffi.structural_hash(func.with_attr('global_symbol', 'kernel')) & 0xFFFF_FFFF_FFFF_FFFF:016x}"
