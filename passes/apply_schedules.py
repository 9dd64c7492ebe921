"""Every composite call becomes kernel calls: the first schedule in the order that matches, with the best known tile."""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, relax

from tilewright.compiler.composites import load_spec
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import bindings

logger = logging.getLogger(__name__)

# The argument whose leading extent counts a call's rows, where it is not the first.
_ROWS_ARGUMENT = {"embedding": 1, "kv_append": 1}


@dataclass(frozen=True)
class ApplySchedules(Pass):
    """Lower composites to kernels.

    before   y = linear0(x, w)                                   # private function with tw.composite, tw.spec
    after    y = R.call_dps_packed("linear_q4_gemv_1f0c…", (x, w), out_ty=R.Tensor((1, N), "float32"))
             @T.prim_func linear_q4_gemv_1f0c…                   # attributes tw.kernel = {schedule, tile, floor, …}

    A kernel is named after its content, so equal calls share one and a cache can key on the name. Kernels stay in the
    module until code generation takes them out. `choose(composite, spec, m, m_max, inner)` picks schedule
    and tile (schedules/order.py). A deferred kernel is an empty function here, whose attribute tw.call says what to ask
    `choose` again for it, and its content is that of its key.
    """

    choose: Callable[[str, Any, int | None, int, tuple[int, ...]], Any]

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
        self._chosen: dict[tuple[Any, ...], tuple[Any, list[str]] | None] = {}
        self._by_body: set[Any] = set()
        self._shared: dict[tuple[Any, ...], list[Any]] = {}  # results of shared kernels in the function at hand

    def lower(self, func: relax.Function) -> relax.Function:
        bounds = {str(k): int(v) for k, v in (func.attrs or {}).get("tir_var_upper_bound", {}).items()}
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
        attrs = self.mod[call.op].attrs
        composite = str(attrs["tw.composite"])
        rows, *others = self.extents(call)
        inner = tuple(int(d.value) for d in others[:-1])
        static = int(rows.value) if isinstance(rows, tvm.tirx.IntImm) else None
        key = (composite, str(attrs["tw.spec"]), static, static or bounds[rows.name], inner)
        if key not in self._chosen:
            self._chosen[key] = self._choose(composite, *key[1:])
        return self._chosen[key]

    def extents(self, call: ir.Call) -> Any:
        """The shape of the argument whose leading extent counts a composite call's rows."""
        composite = str(self.mod[call.op].attrs["tw.composite"])
        return call.args[_ROWS_ARGUMENT.get(composite, 0)].ty.shape.values

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
        rows = self.extents(call)[0]
        values: dict[str, Any] = {}

        def value(ref: int | str) -> Any:
            return call.args[ref] if isinstance(ref, int) else values[ref]

        for kernel, name in zip(lowering.kernels, names, strict=True):
            inputs = tuple(value(i) for i in kernel.inputs)
            parts = self._shared.get((name, inputs)) if kernel.shared else None
            if parts is None:
                parts = _launch(builder, name, inputs, kernel.outputs, rows)
            if kernel.shared:
                self._shared[name, inputs] = parts
            values |= {out.name: part for out, part in zip(kernel.outputs, parts, strict=True)}
        results = [value(r) for r in lowering.results]
        return results[0] if len(results) == 1 else relax.Tuple(results)

    def _choose(
        self, composite: str, spec_text: str, m: int | None, m_max: int, inner: tuple[int, ...]
    ) -> tuple[Any, list[str]] | None:
        choice = self.choose(composite, load_spec(composite, spec_text), m, m_max, inner)
        if choice is None:
            return None
        kernels = choice.lowering.kernels
        names: list[str] = []
        for kernel in kernels:
            content = kernel.content or _content(kernel.func)
            name = f"{choice.schedule.name}_{content[:12]}"
            about = {
                "schedule": choice.schedule.name,
                "composite": composite,
                "rows": m,
                "max_rows": m_max,
                "tile": dataclasses.asdict(choice.tile),
                # The floor is the whole call's; its last kernel, which does the work, carries it.
                "floor": dataclasses.asdict(choice.floor) if kernel is kernels[-1] else None,
            }
            attrs = {"global_symbol": name, "tw.content": content, "tw.kernel": json.dumps(about, sort_keys=True)}
            func = kernel.func
            if kernel.content:
                attrs["tw.call"] = json.dumps([composite, spec_text, m, m_max, inner, len(names)])
                func = tvm.tirx.PrimFunc([], tvm.tirx.Evaluate(0))
            self.kernels[name] = func.with_attrs(attrs)
            names.append(name)
        logger.debug("%s %s -> %s", composite, choice.facts, names)
        return choice.lowering, names


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
