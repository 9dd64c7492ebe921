"""The step in one compiled variant per batch bucket."""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import ir, relax, tirx

from tilewright.compiler.errors import CompileError
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import op_name


@dataclass(frozen=True)
class PlanBuckets(Pass):
    """Specialise `step` for pure decode batches of stated sizes, and bound what stays symbolic.

    before   step(tokens[t], ..., kv_len[b], rows[r], ...)
    after    step(tokens[t], ...)        tir_var_upper_bound = {t: max_tokens, b: max_batch, r: max_batch}
             step_1(tokens[1], ..., kv_len[1], rows[1], ...)      one token of one sequence, static
             step_decode(tokens[n], ..., kv_len[n], rows[n], ...)         tir_var_upper_bound = {n: max_batch}

    before   last = take(h, rows)                # in step
    after    last = h                            # in the others: row i of a decode batch is its token i

    decode: sizes with a static step. any_decode: whether there is a step for decode batches of any size, where kernels
    can do without what only prompts need.

    A static size lets schedules pick kernels for it and TVM plan its memory once; the bounds make the storage of the
    other steps static too. Steps that only decode have the attribute tw.decode.
    """

    decode: tuple[int, ...]
    max_tokens: int
    max_batch: int
    any_decode: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_batch <= self.max_tokens:
            raise CompileError(
                f"max batch is {self.max_batch}, max tokens {self.max_tokens}: a step of max tokens must hold one for "
                "each sequence; raise --max-tokens or lower --max-batch"
            )

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        functions: dict[Any, Any] = dict(mod.functions.items())
        for gvar, func in mod.functions.items():
            if gvar.name_hint not in ("step", "logits", "hidden", "layers"):
                continue
            is_step = gvar.name_hint == "step"
            functions[gvar] = self._bounded(func, self.max_tokens, is_step)
            for size in self.decode if is_step else ():
                functions[f"step_{size}"] = _decoding(func, f"step_{size}", tirx.IntImm("int64", size))
            if self.any_decode and is_step:
                decoding = _decoding(func, "step_decode", tirx.Var("n", "int64"))
                functions["step_decode"] = decoding.with_attr("tir_var_upper_bound", {"n": self.max_batch})
        return tvm.IRModule(functions, mod.attrs)

    def _bounded(self, func: relax.Function, tokens: int, is_step: bool) -> relax.Function:
        """The function with bounds on its symbolic extents; only steps have fewer rows than tokens."""
        sequences = min(self.max_batch, tokens)
        rows = sequences if is_step else tokens
        return func.with_attr("tir_var_upper_bound", {"t": tokens, "b": sequences, "r": rows})


def _decoding(func: relax.Function, name: str, size: Any) -> relax.Function:
    """The function with one token for each of `size` sequences, all of them wanted, in order."""
    sizes = {v.name: size for v in relax.analysis.defined_symbolic_vars(func) if v.name in ("t", "b", "r")}
    decoding = relax.utils.copy_with_new_vars(func).bind_symbolic_vars(sizes)
    return _without_selection(decoding).with_attrs({"global_symbol": name, "tw.decode": True})


def _without_selection(func: relax.Function) -> relax.Function:
    rows = next(p for p in func.params if p.name == "rows")

    @relax.expr_functor.mutator
    class Rewrite(relax.PyExprMutator):
        def visit_call_(self, call: ir.Call) -> Any:
            call = super().visit_call_(call)
            selects = op_name(call) == "take" and call.args[1].same_as(rows)
            return call.args[0] if selects else call

    return Rewrite().visit_expr(func)
