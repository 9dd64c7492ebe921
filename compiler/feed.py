"""The function that hands a drawn token on to the next step on the device, so that no step waits for the host."""

from typing import Any

import tvm
from tvm import relax, te, tirx


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
            output = builder.emit_output(builder.call_te(_fed, tokens, ids))
        builder.emit_func_output(output)
    functions: dict[Any, Any] = {**builder.get().functions, **mod.functions}
    return tvm.IRModule(functions, mod.attrs)


def _fed(tokens: Any, ids: Any) -> Any:
    """One loop, for one launch. A row that no step drew is clipped."""

    def token(i: Any) -> Any:
        row = tirx.max(tirx.min(-1 - tokens[i], tirx.Cast("int32", ids.shape[0] - 1)), 0)
        return tirx.if_then_else(tokens[i] < 0, ids[row], tokens[i])

    return te.compute(tokens.shape, token, name="fed")
