"""The step in one compiled variant per batch bucket."""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from tilewright.compiler.errors import CompileError
from tilewright.compiler.pass_base import Pass


@dataclass(frozen=True)
class PlanBuckets(Pass):
    """Specialise `step` for pure decode batches of stated sizes, and bound what stays symbolic.

    before   step(tokens[t], ..., kv_len[b], rows[r], ...)
    after    step(tokens[t], ...)        tir_var_upper_bound = {t: max_tokens, b: max_batch, r: max_batch}
             step_1(tokens[1], ..., kv_len[1], rows[1], ...)      one token of one sequence, static

    A static size lets schedules pick kernels for it and TVM plan its memory once; the bounds make the storage of the
    general step static too.
    """

    decode: tuple[int, ...]
    max_tokens: int
    max_batch: int

    def __post_init__(self) -> None:
        if not 0 < self.max_batch <= self.max_tokens:
            raise CompileError(
                f"max batch is {self.max_batch}, max tokens {self.max_tokens}: a step of max tokens must hold one for "
                "each sequence; raise --max-tokens or lower --max-batch"
            )

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        functions: dict[Any, Any] = dict(mod.functions.items())
        for gvar, func in mod.functions.items():
            if gvar.name_hint not in ("step", "logits", "layers"):
                continue
            rows = self.max_batch if gvar.name_hint == "step" else self.max_tokens
            functions[gvar] = func.with_attr(
                "tir_var_upper_bound", {"t": self.max_tokens, "b": self.max_batch, "r": rows}
            )
            for size in self.decode if gvar.name_hint == "step" else ():
                functions[f"step_{size}"] = _specialise(func, size).with_attr("global_symbol", f"step_{size}")
        return tvm.IRModule(functions, mod.attrs)


def _specialise(func: relax.Function, size: int) -> relax.Function:
    """The function with one token for each of `size` sequences."""
    sizes = {v: tirx.IntImm("int64", size) for v in _shape_vars(func) if v.name in ("t", "b", "r")}
    return relax.utils.copy_with_new_vars(func).bind_symbolic_vars({v.name: n for v, n in sizes.items()})


def _shape_vars(func: relax.Function) -> list[tirx.Var]:
    return list(relax.analysis.defined_symbolic_vars(func))
