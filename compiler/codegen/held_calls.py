"""Kernel calls whose results nobody uses, kept through TVM's passes, several of which would drop them.

A kernel may do its work in what it is given, such as another kernel's output, and then its own output is a formality.
While passes run that take an unused result for dead code, such results are among those that the function returns.

    before   done = R.call_dps_packed("mark", (y,), …)       # not used
             R.output(result)   return result
    held     done = R.call_dps_packed("mark", (y,), …)
             R.output(result, done)   held = result, done   return held
"""

from typing import Any

from tilewright.compiler.relax_utils import bindings, op_name, operands

_COUNT = "tw.held_calls"


def hold_calls(mod: Any) -> Any:
    """Every function with unused kernel calls returns them too, until `release_calls`."""
    return _each_function(mod, _hold)


def release_calls(mod: Any) -> Any:
    """Every function returns again what it did before `hold_calls`; the calls stay."""
    return _each_function(mod, _release)


def _each_function(mod: Any, rewrite: Any) -> Any:
    import tvm
    from tvm import relax

    functions = {g: rewrite(f) if isinstance(f, relax.Function) else f for g, f in mod.functions.items()}
    return tvm.IRModule(functions, mod.attrs)


def _hold(func: Any) -> Any:
    from tvm import relax

    unused = _unused_calls(func)
    if not unused:
        return func
    blocks: list[Any] = []
    held: list[Any] = []
    for block in func.body.blocks:
        bindings = []
        for binding in block.bindings:
            if binding.var in unused:
                # A variable of a dataflow block is not seen outside of it; a plain one is what the block puts out.
                held.append(relax.Var(binding.var.name, binding.var.ty))
                bindings.append(relax.VarBinding(held[-1], binding.value))
            elif not (isinstance(binding.value, relax.TupleGetItem) and binding.value.tuple_value in unused):
                bindings.append(binding)
        blocks.append(type(block)(bindings))
    values = relax.Tuple([func.body.body, *held])
    result = relax.Var("held", values.ty or relax.TupleType([func.ret_ty, *(var.ty for var in held)]))
    body = relax.SeqExpr([*blocks, relax.BindingBlock([relax.VarBinding(result, values)])], result)
    return _with_body(func, body, result.ty).with_attr(_COUNT, len(held))


def _release(func: Any) -> Any:
    from tvm import relax

    if _COUNT not in (func.attrs or {}):
        return func
    *blocks, last = func.body.blocks
    *bindings, held = last.bindings
    assert held.var == func.body.body and isinstance(held.value, relax.Tuple), func
    if bindings:
        blocks.append(type(last)(bindings))
    result = held.value.fields[0]
    return _with_body(func, relax.SeqExpr(blocks, result), result.ty).without_attr(_COUNT)


def _with_body(func: Any, body: Any, ret_ty: Any) -> Any:
    from tvm import relax

    return relax.Function(func.params, body, ret_ty, func.is_pure, func.attrs)


def _unused_calls(func: Any) -> set[Any]:
    """Variables of kernel calls whose results are not used, save for being taken out of their tuple."""
    from tvm import relax

    everything = bindings(func)
    result = list(operands(func.body.body))
    mentioned = {*result, *(var for b in everything for var in operands(b.value))}
    live = [b.value for b in everything if not isinstance(b.value, relax.TupleGetItem) or b.var in mentioned]
    used = {*result, *(var for value in live for var in operands(value))}
    return {b.var for b in everything if op_name(b.value) == "call_dps_packed" and b.var not in used}
