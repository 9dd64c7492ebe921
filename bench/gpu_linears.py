"""Linears, y = x W^T, beside torch's, which calls cuBLAS."""

from functools import partial

import torch
from cases import LinearShape
from gpu_compiled import Compiled, compiled, lowered
from gpu_work import Variant, Work, copies, distance

from tilewright.compiler.composites import GatedSpec, LinearSpec
from tilewright.schedules.base import Call
from tilewright.schedules.cuda.linear import Linear


def compile_case(shape: LinearShape) -> Compiled:
    gate = GatedSpec(shape.outputs // 2, "silu", "bfloat16") if shape.gated else None
    spec = LinearSpec(shape.outputs, shape.depth, "bf16_rows", gate=gate, dtype="bfloat16", out_dtype=shape.out_dtype)
    return compiled(lowered(Linear(), Call("linear", spec, None, shape.tokens)))


def work(shape: LinearShape, ours: Compiled) -> Work:
    """Weights differ from call to call, so that each comes from memory."""
    m, n, k = shape.tokens, shape.outputs, shape.depth
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for _ in range(copies(2 * n * k))]
    product = x.float() @ weights[0].float().t()
    made: dict[str, torch.Tensor] = {}
    own = [ours.bind((x, weight), m, made)[1] for weight in weights]
    expected = torch.nn.functional.silu(product[:, : n // 2]) * product[:, n // 2 :] if shape.gated else product
    y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    peers = [partial(torch.matmul, x, weight.t(), out=y) for weight in weights]
    variants = [
        Variant("tilewright", own, lambda: distance(made["y"], expected)),
        Variant("cublas", peers, lambda: distance(y, product)),
    ]
    out_bytes = expected.numel() * (4 if shape.out_dtype == "float32" else 2)
    return Work(variants, 2 * (n * k + m * k) + out_bytes, 2 * m * n * k)
