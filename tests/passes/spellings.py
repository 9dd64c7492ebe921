"""One small model in several spellings, small programs, and what tests of passes ask of a module.

The model is a llama of two layers with grouped queries: written by hand, and exported from torch plainly, with
scaled_dot_product_attention, and as transformers writes it ([1, n] tokens, repeated KV heads, an additive mask).
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from torch import nn
from tvm import relax, tirx
from tvm.relax.frontend import detach_params
from tvm.relax.frontend.torch import from_exported_program

from tests.tolerances import assert_close
from tilewright.compiler.relax_utils import bindings, composite_of, main_function, op_name, param_entries, rebuild
from tilewright.compiler.verify import verify
from tilewright.passes.canonicalize import Canonicalize

op = relax.op
TARGET = tvm.target.Target({"kind": "llvm", "opt-level": 0})  # small shapes: compiling is what takes time
SPELLINGS = ("by_hand", "plain", "sdpa", "transformers")


@dataclass(frozen=True)
class Sizes:
    hidden: int = 24
    inter: int = 20
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 10
    vocab: int = 31
    eps: float = 1e-5
    theta: float = 10000.0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


SIZES = Sizes()


def weight_shapes(c: Sizes) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (c.vocab, c.hidden)}
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i in range(c.layers):
        layer = {
            "attn_norm": (c.hidden,),
            "q": (q, c.hidden),
            "k": (kv, c.hidden),
            "v": (kv, c.hidden),
            "o": (c.hidden, q),
            "mlp_norm": (c.hidden,),
            "gate": (c.inter, c.hidden),
            "up": (c.inter, c.hidden),
            "down": (c.hidden, c.inter),
        }
        shapes |= {f"layers.{i}.{name}.weight": s for name, s in layer.items()}
    return shapes | {"norm.weight": (c.hidden,), "lm_head.weight": (c.vocab, c.hidden)}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers, matrices scaled to keep magnitudes; under the names here and under those that torch exports."""
    rng = np.random.default_rng(seed)
    weights = {
        name: (rng.standard_normal(s) / (np.sqrt(s[-1]) if len(s) > 1 else 1)).astype("float32")
        for name, s in shapes.items()
    }
    return weights | {"p_" + name.replace(".", "_"): w for name, w in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def program(
    shapes: dict[str, tuple[int, ...]], body: Callable[..., Any], rows: int = 24, name: str = "forward"
) -> tvm.IRModule:
    """`forward(tokens, table[13, rows], *weights)`: body(emit, x[n, rows] = table[tokens], weights by name)."""
    builder = relax.BlockBuilder()
    tokens = relax.Var("tokens", relax.TensorType([tirx.Var("n", "int64")], "int32"))
    shapes = {"table": (13, rows), **shapes}
    weights = {k: relax.Var(k.replace(".", "_"), relax.TensorType(s, "float32")) for k, s in shapes.items()}
    with builder.function(name, [tokens, *weights.values()], attrs={"num_input": 1, "tw.params": params_json(shapes)}):
        with builder.dataflow():
            x = builder.emit(op.take(weights["table"], tokens, axis=0, mode="clip"))
            out = builder.emit_output(body(builder.emit, x, weights))
        builder.emit_func_output(out)
    return Canonicalize()(builder.get())


def params_json(shapes: dict[str, tuple[int, ...]]) -> str:
    return json.dumps([{"name": k, "sources": [k], "shape": list(s), "format": "f32"} for k, s in shapes.items()])


def by_hand(c: Sizes = SIZES) -> tvm.IRModule:
    """nn.rms_norm, rotate-half rope, tril mask, nn.silu."""

    def body(emit: Any, x: Any, w: dict[str, Any]) -> Any:
        n = x.ty.shape[0]

        def linear(x: Any, name: str) -> Any:
            return emit(op.matmul(x, emit(op.permute_dims(w[f"{name}.weight"]))))

        def norm(x: Any, name: str) -> Any:
            return emit(op.nn.rms_norm(x, w[f"{name}.weight"], axes=[-1], epsilon=c.eps))

        def heads(x: Any, count: int) -> Any:
            return emit(op.reshape(x, (n, count, c.head_dim)))

        frequencies = (1 / c.theta ** (np.arange(0, c.head_dim, 2) / c.head_dim)).astype("float32")
        positions = emit(op.astype(emit(op.arange(0, n, 1, dtype="int64")), "float32"))
        angles = emit(op.multiply(emit(op.expand_dims(positions, 1)), relax.const(frequencies[None])))
        angles = emit(op.concat([angles, angles], axis=-1))
        cos, sin = (emit(op.expand_dims(emit(f(angles)), 1)) for f in (op.cos, op.sin))
        for i in range(c.layers):
            layer = f"layers.{i}"
            h = norm(x, f"{layer}.attn_norm")
            q, k, v = (
                heads(linear(h, f"{layer}.{name}"), count)
                for name, count in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
            )
            q, k = (rotate_half(emit, t, cos, sin) for t in (q, k))
            out = attention(emit, q, k, v, c.scale, tril_mask(emit, n))
            x = emit(op.add(x, linear(emit(op.reshape(out, (n, c.heads * c.head_dim))), f"{layer}.o")))
            h = norm(x, f"{layer}.mlp_norm")
            gate = emit(op.nn.silu(linear(h, f"{layer}.gate")))
            x = emit(op.add(x, linear(emit(op.multiply(gate, linear(h, f"{layer}.up"))), f"{layer}.down")))
        return linear(norm(x, "norm"), "lm_head")

    shapes = weight_shapes(c)
    table = shapes.pop("embed.weight")
    mod = program(shapes, body, rows=c.hidden)
    return _with_table(mod, table, "embed.weight")


def _with_table(mod: tvm.IRModule, shape: tuple[int, ...], source: str) -> tvm.IRModule:
    """The program with its table of this shape and source."""
    _, func = main_function(mod)
    entries = param_entries(func)
    entries[0] = {"name": source, "sources": [source], "shape": list(shape), "format": "f32"}

    def params(emitter: Any, func: Any) -> list[Any]:
        new = [relax.Var(p.name, p.ty) for p in func.params]
        new[1] = relax.Var("embed", relax.TensorType(shape, "float32"))
        emitter.new.update(zip(func.params, new, strict=True))
        return new

    return rebuild(mod, {}, params=params, attrs={"tw.params": json.dumps(entries)})


def rotate_half(emit: Any, x: Any, cos: Any, sin: Any) -> Any:
    """x * cos + concat(-x2, x1) * sin over the last axis."""
    size = int(x.ty.shape[-1])
    axis = len(x.ty.shape.values) - 1
    a = emit(op.strided_slice(x, [axis], [0], [size // 2]))
    b = emit(op.strided_slice(x, [axis], [size // 2], [size]))
    turned = emit(op.concat([emit(op.negative(b)), a], axis=-1))
    return emit(op.add(emit(op.multiply(x, cos)), emit(op.multiply(turned, sin))))


def tril_mask(emit: Any, n: Any) -> Any:
    return emit(op.tril(emit(op.ones((n, n), "bool"))))


def attention(
    emit: Any, q: Any, k: Any, v: Any, scale: float, mask: Any | None, soft_cap: float | None = None, axis: int = -1
) -> Any:
    """q[n,H,D], k, v[n,G,D] -> [n,H,D], KV heads repeated."""
    k, v = (emit(op.repeat(t, int(q.ty.shape[1]) // int(t.ty.shape[1]), 1)) for t in (k, v))
    q, k, v = (emit(op.permute_dims(t, [1, 0, 2])) for t in (q, k, v))
    scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 2, 1]))))
    scores = emit(op.multiply(scores, relax.const(scale)))
    if soft_cap is not None:
        scores = emit(op.tanh(emit(op.divide(scores, relax.const(soft_cap)))))
        scores = emit(op.multiply(scores, relax.const(soft_cap)))
    if mask is not None:
        scores = emit(op.where(mask, scores, relax.const(-1e30)))
    return emit(op.permute_dims(emit(op.matmul(emit(op.nn.softmax(scores, axis=axis)), v)), [1, 0, 2]))


# ---------------------------------------------------------------------------------------------------------------------
# From torch


class _Norm(nn.Module):
    def __init__(self, c: Sizes) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(c.hidden)), c.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class _Layer(nn.Module):
    def __init__(self, c: Sizes, spelling: str) -> None:
        super().__init__()
        self.c, self.spelling = c, spelling
        self.attn_norm, self.mlp_norm = _Norm(c), _Norm(c)
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        sizes = {"q": (c.hidden, q), "k": (c.hidden, kv), "v": (c.hidden, kv), "o": (q, c.hidden)}
        sizes |= {"gate": (c.hidden, c.inter), "up": (c.hidden, c.inter), "down": (c.inter, c.hidden)}
        for name, (ins, outs) in sizes.items():
            setattr(self, name, nn.Linear(ins, outs, bias=False))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.attn_norm(x)
        *batch, n, _ = h.shape
        q, k, v = (p(h).view(*batch, n, -1, self.c.head_dim).transpose(-3, -2) for p in (self.q, self.k, self.v))
        q, k = (t * cos + self._turn(t) * sin for t in (q, k))
        out = self._attend(q, self._repeat(k), self._repeat(v), mask)
        x = x + self.o(out.transpose(-3, -2).reshape(*batch, n, -1))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        half = self.c.head_dim // 2
        return torch.cat([-x[..., half:], x[..., :half]], -1)

    def _repeat(self, x: torch.Tensor) -> torch.Tensor:
        group = self.c.heads // self.c.kv_heads
        *batch, heads, n, dim = x.shape
        return x.unsqueeze(-3).expand(*batch, heads, group, n, dim).reshape(*batch, heads * group, n, dim)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.spelling == "sdpa":
            return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.c.scale + mask
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


class _Llama(nn.Module):
    def __init__(self, c: Sizes, spelling: str) -> None:
        super().__init__()
        self.c, self.spelling = c, spelling
        self.embed = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList([_Layer(c, spelling) for _ in range(c.layers)])
        self.norm, self.lm_head = _Norm(c), nn.Linear(c.hidden, c.vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        c, positions = self.c, torch.arange(tokens.shape[-1])
        inverse = 1.0 / c.theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        if self.spelling == "transformers":
            angles = (inverse[None, :, None] @ positions[None, None, :].float()).transpose(1, 2)
            mask = torch.where(positions[None, :] <= positions[:, None], 0.0, torch.finfo(torch.float32).min)[
                None, None
            ]
        else:
            angles = positions.float()[:, None] * inverse[None]
            mask = torch.triu(torch.full((tokens.shape[-1],) * 2, float("-inf")), diagonal=1)
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos(), angles.sin()
        if self.spelling == "transformers":
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.lm_head(self.norm(x))


@cache
def model(spelling: str) -> tvm.IRModule:
    """The model as its front end gives it: before canonicalize, where it comes from torch."""
    if spelling == "by_hand":
        return by_hand()
    module = _Llama(SIZES, spelling).eval()
    tokens = torch.arange(9, dtype=torch.int32)
    length = torch.export.Dim("n", min=2, max=4096)
    batched = spelling == "transformers"
    exported = torch.export.export(
        module, (tokens[None] if batched else tokens,), dynamic_shapes={"tokens": {1 if batched else 0: length}}
    )
    return detach_params(from_exported_program(exported, keep_params_as_input=True))[0]


# ---------------------------------------------------------------------------------------------------------------------
# What tests ask


def runner(mod: tvm.IRModule, weights: dict[str, np.ndarray]) -> Callable[[Sequence[int]], np.ndarray]:
    """`forward` compiled for this machine, as tokens -> result; joined parameters are stacked from their sources."""
    _, func = main_function(mod)
    params = [np.concatenate([weights[s] for s in e["sources"]]) for e in param_entries(func)]
    executable = tvm.compile(mod, TARGET, relax_pipeline=relax.get_default_pipeline(TARGET))
    forward = relax.VirtualMachine(executable, tvm.cpu())["forward"]
    return lambda tokens: forward(*map(tvm.runtime.tensor, [np.array(tokens, "int32"), *params])).numpy()


def run(mod: tvm.IRModule, tokens: Sequence[int], weights: dict[str, np.ndarray]) -> np.ndarray:
    """The result of `forward` on one sequence."""
    return runner(mod, weights)(tokens)


def weights_of(mod: tvm.IRModule, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights for a program."""
    return random_weights({e["sources"][0]: tuple(e["shape"]) for e in param_entries(main_function(mod)[1])}, seed)


def composites(mod: tvm.IRModule) -> Counter[str]:
    """How many calls of each composite `forward` makes."""
    found = (composite_of(mod, b.value) for b in bindings(main_function(mod)[1]))
    return Counter(c[0] for c in found if c is not None)


def operators(mod: tvm.IRModule) -> Counter[str]:
    """How many calls of each plain operator `forward` makes."""
    names = (op_name(b.value) for b in bindings(main_function(mod)[1]))
    return Counter(n for n in names if n is not None)


def spec_of(mod: tvm.IRModule, composite: str) -> Any:
    """The one spec of a composite in `forward`."""
    found = [composite_of(mod, b.value) for b in bindings(main_function(mod)[1])]
    (spec,) = {c[1] for c in found if c is not None and c[0] == composite}
    return spec


def at_stage(mod: tvm.IRModule, stage: str) -> tvm.IRModule:
    """The module with its function marked: a single pass may run without fuse_attention, which marks it."""
    gv, func = main_function(mod)
    return tvm.IRModule({**dict(mod.functions.items()), gv: func.with_attr("tw.stage", stage)})


def check_fused(before: tvm.IRModule, after: tvm.IRModule, kind: str = "float32", length: int = 7) -> None:
    """Well formed, legal at stage "fused", parseable back, and numerically what it was."""
    after = at_stage(after, "fused")
    verify(after, "fused")
    check_round_trip(after)
    weights = weights_of(before, seed=length)
    tokens = np.random.default_rng(length).integers(0, 13, length)
    assert_close(run(after, tokens, weights), run(before, tokens, weights), kind)


def check_round_trip(mod: tvm.IRModule) -> None:
    parsed = tvm.script.from_source(mod.script(show_meta=True))
    tvm.ir.assert_structural_equal(mod, parsed)


def check_unchanged(before: tvm.IRModule, after: tvm.IRModule) -> None:
    """A pass that found nothing leaves the function as it was, the stage's name aside."""
    tvm.ir.assert_structural_equal(at_stage(before, "model"), at_stage(after, "model"))
