"""The functions that gates apply, as expressions in float32."""

from typing import Any

from tvm.script import tirx as T

_SQRT_2_OVER_PI = 0.7978845608028654


def activate(name: str, x: Any) -> Any:
    """silu: x / (1 + e^-x). gelu_tanh: the approximation of Hendrycks and Gimpel 2016. x: a float32 expression."""
    if name == "silu":
        return x / (T.float32(1) + T.exp(-x))
    if name == "gelu_tanh":
        inner = T.float32(_SQRT_2_OVER_PI) * (x + T.float32(0.044715) * x * x * x)
        return T.float32(0.5) * x * (T.float32(1) + T.tanh(inner))
    raise ValueError(f"activation {name!r} is none of silu, gelu_tanh")
