"""What every kernel of a dense linear takes: (x[M,K], weight[N,K], bias f32[N], residual[M,O], y[M,O]).

O = N or, gated, N / 2; x, weight and residual are of spec.dtype, y of spec.out_dtype. With a norm, x is what the norm
gives, the norm's weight f32[K] is in the bias' place, and what is normalised, [M,K], in the residual's: a kernel reads
either the one or the other two.
"""

from typing import Any

from tvm.script import tirx as T

from tilewright.compiler.composites import LinearSpec


def match_arguments(spec: LinearSpec, m: Any, x: Any, weight: Any, bias: Any, residual: Any, y: Any) -> tuple[Any, ...]:
    """The handles as buffers. A bias or residual that the spec has not is not read: the weight stands for it."""
    n, k, outs = spec.out_features, spec.in_features, spec.result_features
    x = T.match_buffer(x, (m, k), spec.dtype)
    if spec.norm:
        bias, residual = T.match_buffer(bias, (k,), "float32"), T.match_buffer(residual, (m, k), spec.dtype)
        weight = T.match_buffer(weight, (n, k), spec.dtype)
        return x, weight, bias, residual, T.match_buffer(y, (m, outs), spec.out_dtype)
    weight = T.match_buffer(weight, (n, k), spec.dtype)
    bias = T.match_buffer(bias, (n,), "float32") if spec.bias else weight
    residual = T.match_buffer(residual, (m, outs), spec.dtype) if spec.residual else weight
    return x, weight, bias, residual, T.match_buffer(y, (m, outs), spec.out_dtype)
