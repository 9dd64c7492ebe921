"""The function that hands a drawn token on to the next step on the device, so that no step waits for the host."""

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import op


def add_feed(mod: tvm.IRModule) -> tvm.IRModule:
    """The scheduled module with

        feed(tokens i32[t], ids i32[r]) -> i32[t]

    which replaces a token -1 - i by ids[i], the token that row i of the step before drew, and keeps the others.
    """
    t, r = tirx.Var("t", "int64"), tirx.Var("r", "int64")
    tokens, ids = (relax.Var(name, relax.TensorType((size,), "int32")) for name, size in (("tokens", t), ("ids", r)))
    builder = relax.BlockBuilder()
    with builder.function("feed", [tokens, ids]):
        with builder.dataflow():
            output = builder.emit_output(_fed(builder.emit, tokens, ids))
        builder.emit_func_output(output)
    functions: dict[Any, Any] = dict(mod.functions.items())
    functions["feed"] = builder.get()["feed"]
    return tvm.IRModule(functions, mod.attrs)


def _fed(emit: Any, tokens: Any, ids: Any) -> Any:
    rows = emit(op.subtract(relax.const(-1, "int32"), tokens))
    drawn = emit(op.take(ids, rows, axis=0, mode="clip"))
    return op.where(emit(op.less(tokens, relax.const(0, "int32"))), drawn, tokens)
