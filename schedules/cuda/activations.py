"""What gates do, as expressions in float32: activation(gate) * up.

Both activations are x times a sigmoid, which takes two instructions of the special function unit; a division to the
last bit takes eight more and a branch, which was a tenth of the time of a large linear with a gate. No step is left to
the compiler to contract with what follows: every kernel gives the same bits.
"""

from typing import Any

from tvm.script import tirx as T

_SIGMOID = """
__device__ __forceinline__ float tw_sigmoid(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(__fmul_rn(x, -1.4426950408889634f)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(__fadd_rn(1.0f, y)));
  return y;
}
"""
# 0.5 (1 + tanh(u)) is the sigmoid of 2 u; u = sqrt(2 / pi) (x + 0.044715 x^3).
_SIGMOID_OF = {
    "silu": "gate",
    "gelu_tanh": "__fmul_rn(gate, __fmaf_rn(__fmul_rn(gate, gate), 0.071354816272f, 1.5957691216f))",
}


def gate_product(name: str, gate: Any, up: Any) -> Any:
    """activation(gate) * up. silu: x / (1 + e^-x). gelu_tanh: the approximation of Hendrycks and Gimpel 2016. Relative
    error 2^-21 + |x| 2^-23. Raises ValueError for another name."""
    if name not in _SIGMOID_OF:
        raise ValueError(f"activation {name!r} is none of {', '.join(_SIGMOID_OF)}")
    function = f"""{_SIGMOID.replace("tw_sigmoid", f"tw_{name}_sigmoid")}
__device__ __forceinline__ float tw_{name}(float gate, float up) {{
  return __fmul_rn(__fmul_rn(gate, tw_{name}_sigmoid({_SIGMOID_OF[name]})), up);
}}
"""
    return T.cuda.func_call(f"tw_{name}", gate, up, source_code=function, return_type="float32")
