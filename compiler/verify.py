"""The grammar of each stage: which functions, operators and attributes are legal there.

    model      forward(tokens[n], *params), plain operators
    fused      the same with calls to private composites; no score, [.., n, n], outside of them
    served     logits and step over a ragged batch; `pages` is one value at a time
    scheduled  calls of kernels in place of composites, but for those that no schedule takes

The driver verifies between passes; a violation names the binding.
"""

from collections.abc import Callable, Iterable
from typing import Any

import tvm
from tvm import ir, relax, tirx

from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS, AttentionSpec
from tilewright.compiler.errors import CompileError
from tilewright.compiler.operators import PLAIN
from tilewright.compiler.relax_utils import (
    bindings,
    composite_of,
    input_count,
    is_tensor,
    main_function,
    op_name,
    param_entries,
    refusals,
    shape,
    static,
    static_shape,
    symbolic_vars,
    weight_params,
)

FUSED = frozenset(["attention", "rope", "rms_norm", "gated", "linear", "embedding"])
SERVED = FUSED - {"attention"} | {"angles", "kv_append", "paged_attention", "qkv_append", "sample"}
KERNEL_CALLS = frozenset(["call_dps_packed", "call_tir", "call_tir_inplace"])


def verify(mod: tvm.IRModule, stage: str) -> None:
    """Raise CompileError, naming the binding, where `mod` is no module of this stage."""
    if stage not in _STAGES:
        raise CompileError(f"stage {stage!r} is unknown; the stages are {', '.join(_STAGES)}")
    if not relax.analysis.check_well_formed(mod):
        raise CompileError(f"the module is not well formed at stage {stage!r}; a pass before it is wrong")
    _STAGES[stage](mod)


def _verify_model(mod: tvm.IRModule) -> None:
    gv, func = main_function(mod)
    _only_functions(mod, [gv], frozenset(), "model")
    _check_forward(func, "model")
    _check_body(mod, func, PLAIN, frozenset(), "model")


def _verify_fused(mod: tvm.IRModule) -> None:
    gv, func = main_function(mod)
    _only_functions(mod, [gv], FUSED, "fused")
    _check_forward(func, "fused")
    _no_scores(func)
    _check_body(mod, func, PLAIN, FUSED, "fused")
    for binding in bindings(func):
        composite = composite_of(mod, binding.value)
        if composite is not None and composite[0] == "attention":
            _check_attention(binding, composite[1])


def _verify_served(mod: tvm.IRModule) -> None:
    public = _public(mod)
    _only_functions(mod, public, SERVED, "served")
    for gv in public:
        func = mod[gv]
        _check_attributes(func, "served")
        _check_step_inputs(gv.name_hint, func)
        _check_body(mod, func, PLAIN, SERVED, "served")
        _check_pages(mod, func)


def _verify_scheduled(mod: tvm.IRModule) -> None:
    public = _public(mod)
    _only_functions(mod, public, SERVED, "scheduled")
    for gv in public:
        _check_attributes(mod[gv], "scheduled")
        _check_body(mod, mod[gv], PLAIN | KERNEL_CALLS, SERVED, "scheduled")


_STAGES: dict[str, Callable[[tvm.IRModule], None]] = {
    "model": _verify_model,
    "fused": _verify_fused,
    "served": _verify_served,
    "scheduled": _verify_scheduled,
}

# ---------------------------------------------------------------------------------------------------------------------
# Functions


def _public(mod: tvm.IRModule) -> list[ir.GlobalVar]:
    functions = [(gv, f) for gv, f in mod.functions.items() if isinstance(f, relax.Function)]
    return [gv for gv, f in functions if "global_symbol" in (f.attrs or {})]


def _only_functions(mod: tvm.IRModule, entries: Iterable[ir.GlobalVar], composites: frozenset[str], stage: str) -> None:
    """Beside the entries only composites of the stage, and TIR where a body or kernel may be TIR."""
    names = {gv.name_hint for gv in entries}
    for gv, func in mod.functions.items():
        if gv.name_hint in names:
            continue
        if isinstance(func, tirx.PrimFunc) and stage in ("served", "scheduled"):
            continue
        kind = str((func.attrs or {}).get("tw.composite", ""))
        if kind not in composites:
            what = f"composite {kind}" if kind else "a function that is no composite"
            raise CompileError(f"function {gv.name_hint} is {what}, which stage {stage!r} does not have")


def _check_attributes(func: relax.Function, stage: str) -> None:
    name = func.attrs["global_symbol"]
    for key in ("num_input", "tw.stage", "tw.params"):
        if key not in func.attrs:
            raise CompileError(f"function {name} lacks the attribute {key}, which every entry carries")
    if func.attrs["tw.stage"] != stage:
        raise CompileError(f"function {name} says stage {str(func.attrs['tw.stage'])!r}, not {stage!r}")
    entries, params = param_entries(func), weight_params(func)
    if len(entries) != len(params):
        raise CompileError(f"function {name} has {len(params)} weights and {len(entries)} entries in tw.params")


def _check_forward(func: relax.Function, stage: str) -> None:
    name = str(func.attrs["global_symbol"])
    if name != "forward":
        raise CompileError(f"the public function is {name}; call it forward")
    _check_attributes(func, stage)
    if input_count(func) != 1:
        raise CompileError(f"forward has {input_count(func)} inputs; it takes the tokens alone")
    tokens = func.params[0]
    if str(tokens.ty.dtype) != "int32" or static_shape(tokens) != [None]:
        raise CompileError(f"the tokens are {tokens.ty}; they must be int32[n] with a symbolic n")
    for entry, param in zip(param_entries(func), weight_params(func), strict=True):
        if static_shape(param) != entry["shape"] or str(param.ty.dtype) != "float32" or entry["format"] != "f32":
            raise CompileError(
                f"parameter {param.name} is {param.ty}; tw.params says {entry['name']} {entry['shape']} "
                f"{entry['format']}, and up to stage 'fused' all weights are float32"
            )


def _check_step_inputs(name: str, func: relax.Function) -> None:
    sampling = list(SAMPLING_INPUTS) if name.startswith("step") else []
    expected = [*STEP_INPUTS, *sampling, "pages"]
    actual = [p.name for p in list(func.params)[: input_count(func)]]
    if actual != expected:
        raise CompileError(f"function {name} has the inputs {', '.join(actual)}; they must be {', '.join(expected)}")


# ---------------------------------------------------------------------------------------------------------------------
# Bindings


def _reject(binding: Any, why: str) -> CompileError:
    value = " ".join(str(binding.value).split())
    return CompileError(f"{binding.var.name} = {value}: {why}")


def _check_body(
    mod: tvm.IRModule, func: relax.Function, operators: frozenset[str], composites: frozenset[str], stage: str
) -> None:
    """Variable bindings of operators and composites that the stage has; tuples, elements of them, constants, names."""
    for binding in bindings(func):
        value = binding.value
        if not isinstance(binding, relax.VarBinding):
            raise _reject(binding, f"stage {stage!r} has variable bindings only")
        if isinstance(value, relax.Var | relax.Tuple | relax.TupleGetItem | ir.GenericConst | tirx.IntImm):
            continue
        composite = composite_of(mod, value)
        if composite is not None and composite[0] in composites:
            continue
        if op_name(value) not in operators:
            what = op_name(value) or (composite[0] if composite else type(value).__name__)
            raise _reject(binding, f"operator {what} is not one of stage {stage!r}")


def _no_scores(func: relax.Function) -> None:
    """Every query meets every key in attention only, so no other value has two token axes."""
    (n,) = symbolic_vars(func.params[0].ty)
    reasons = refusals(func)
    for binding in bindings(func):
        if is_tensor(binding.var) and sum(any(v.same_as(n) for v in _vars(e)) for e in shape(binding.var)) > 1:
            found = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "no softmax(q k^T) v was seen"
            raise _reject(
                binding, f"pairs tokens with tokens outside of an attention that the compiler knows ({found})"
            )


def _vars(extent: Any) -> list[Any]:
    return [] if static(extent) is not None else symbolic_vars(extent)


def _check_attention(binding: Any, spec: AttentionSpec) -> None:
    heads = (spec.heads, spec.kv_heads, spec.kv_heads)
    for name, arg, h in zip("qkv", binding.value.args, heads, strict=True):
        if static_shape(arg) != [None, h, spec.head_dim]:
            raise _reject(binding, f"{name} is {arg.ty}; it must be [n, {h}, {spec.head_dim}]")


def _check_pages(mod: tvm.IRModule, func: relax.Function) -> None:
    """Appends and attentions all take the newest version of the pages: they are written in place, so memory holds it
    alone."""
    newest = next(p for p in func.params if p.name == "pages")
    pairs: set[Any] = set()  # results (q, pages) of qkv_append, not yet taken apart
    for binding in bindings(func):
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            appended = value.tuple_value in pairs and value.index == 1
        else:
            appended = isinstance(value, relax.Var) and value.same_as(newest)
        if appended:
            newest = binding.var
        composite = composite_of(mod, value)
        if composite is None or composite[0] not in _PAGES_ARGUMENT:
            continue
        if not value.args[_PAGES_ARGUMENT[composite[0]]].same_as(newest):
            raise _reject(binding, f"takes another version of the pages than the newest, {newest.name}")
        if composite[0] == "kv_append":
            newest = binding.var
        elif composite[0] == "qkv_append":
            pairs.add(binding.var)


_PAGES_ARGUMENT = {"kv_append": 0, "paged_attention": 1, "qkv_append": -3}
