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
             step_t64(tokens[t], ...)               tir_var_upper_bound = {t: 64, b: 64, r: 64}

    decode: sizes with a static step; mixed: bounds on the tokens of further symbolic steps below max_tokens, whose
    kernels are picked for few tokens.

    A static size lets schedules pick kernels for it and TVM plan its memory once; the bounds make the storage of the
    general step static too.
    """

    decode: tuple[int, ...]
    max_tokens: int
    max_batch: int
    mixed: tuple[int, ...] = ()

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
            is_step = gvar.name_hint == "step"
            functions[gvar] = self._bounded(func, self.max_tokens, is_step)
            for size in self.decode if is_step else ():
                functions[f"step_{size}"] = _specialise(func, size).with_attr("global_symbol", f"step_{size}")
            for bound in self.mixed if is_step else ():
                few = self._bounded(relax.utils.copy_with_new_vars(func), bound, is_step)
                functions[f"step_t{bound}"] = few.with_attr("global_symbol", f"step_t{bound}")
        return tvm.IRModule(functions, mod.attrs)

    def _bounded(self, func: relax.Function, tokens: int, is_step: bool) -> relax.Function:
        """The function with bounds on its symbolic extents; only steps have fewer rows than tokens."""
        sequences = min(self.max_batch, tokens)
        rows = sequences if is_step else tokens
        return func.with_attr("tir_var_upper_bound", {"t": tokens, "b": sequences, "r": rows})


def _specialise(func: relax.Function, size: int) -> relax.Function:
    """The function with one token for each of `size` sequences."""
    sizes = {v: tirx.IntImm("int64", size) for v in _shape_vars(func) if v.name in ("t", "b", "r")}
    return relax.utils.copy_with_new_vars(func).bind_symbolic_vars({v.name: n for v, n in sizes.items()})


def _shape_vars(func: relax.Function) -> list[tirx.Var]:
    return list(relax.analysis.defined_symbolic_vars(func))
