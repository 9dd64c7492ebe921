"""Small models of stage "fused", and a batch driver that steps a served one over pages poisoned with NaN."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from tests.reference import TARGET as REFERENCE_TARGET
from tests.tolerances import assert_close
from tilewright.compiler.bodies import add_composite
from tilewright.compiler.composites import (
    SAMPLING_INPUTS,
    AttentionSpec,
    EmbeddingSpec,
    GatedSpec,
    LinearSpec,
    NormSpec,
    RopeSpec,
)
from tilewright.compiler.relax_utils import Expr, bindings, composite_of, weight_params

op = relax.op
TARGET = tvm.target.Target(REFERENCE_TARGET)


@dataclass(frozen=True)
class Tiny:
    """Sizes of a test model. windows: one entry a layer, None for full attention."""

    hidden: int = 32
    inter: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 37
    windows: tuple[int | None, ...] = (None, 3)
    soft_cap: float | None = None
    qk_norm: bool = False
    joint_qkv: bool = True
    bias: bool = False
    sinks: bool = False
    taps: bool = False
    trouble: str | None = None  # a way to mix tokens
    logits_scale: float | None = None

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


def fused_model(c: Tiny) -> tvm.IRModule:
    """`forward` of a llama-like model: norm, attention, norm, gated MLP, residuals, a tied embedding."""
    return _Writer(c).write()


class _Writer:
    def __init__(self, c: Tiny) -> None:
        self.c = c
        self.builder = relax.BlockBuilder()
        self.n = tirx.Var("n", "int64")
        self.weights: dict[str, Any] = {}
        self._declare()

    def _declare(self) -> None:
        c = self.c
        self.param("embed", c.vocab, c.hidden)
        for i in range(len(c.windows)):
            sizes = (
                {"qkv": c.q_size + 2 * c.kv_size} if c.joint_qkv else {"q": c.q_size, "k": c.kv_size, "v": c.kv_size}
            )
            self.param(f"l{i}.attn_norm", c.hidden)
            for name, size in sizes.items():
                self.param(f"l{i}.{name}", size, c.hidden)
                if c.bias:
                    self.param(f"l{i}.{name}_bias", size)
            if c.qk_norm:
                self.param(f"l{i}.q_norm", c.head_dim)
                self.param(f"l{i}.k_norm", c.head_dim)
            if c.sinks:
                self.param(f"l{i}.sinks", c.heads)
            self.param(f"l{i}.o", c.hidden, c.q_size)
            self.param(f"l{i}.mlp_norm", c.hidden)
            self.param(f"l{i}.gate_up", 2 * c.inter, c.hidden)
            self.param(f"l{i}.down", c.hidden, c.inter)
        self.param("norm", c.hidden)

    def param(self, name: str, *shape: int) -> None:
        self.weights[name] = relax.Var(name.replace(".", "_"), relax.TensorType(shape, "float32"))

    def emit(self, expr: Expr) -> Expr:
        return self.builder.emit(expr)

    def call(self, name: str, spec: Any, *args: Expr, rank: int = 2) -> Expr:
        return self.emit(relax.Call(add_composite(self.builder, name, spec, rank), list(args)))

    def linear(self, x: Expr, name: str) -> Expr:
        weight = self.weights[name]
        outs, ins = (int(e) for e in weight.ty.shape.values)
        bias = self.weights.get(f"{name}_bias")
        spec = LinearSpec(outs, ins, bias=bias is not None)
        return self.call("linear", spec, x, weight, *([bias] if bias is not None else []))

    def norm(self, x: Expr, name: str, rank: int = 2) -> Expr:
        weight = self.weights[name]
        return self.call("rms_norm", NormSpec(int(weight.ty.shape.values[0]), 1e-5), x, weight, rank=rank)

    def write(self) -> tvm.IRModule:
        tokens = relax.Var("tokens", relax.TensorType((self.n,), "int32"))
        entries = [
            {"name": k, "sources": [f"{k}.weight"], "shape": [int(e) for e in v.ty.shape.values], "format": "f32"}
            for k, v in self.weights.items()
        ]
        attrs = {"num_input": 1, "tw.stage": "fused", "tw.params": json.dumps(entries)}
        with self.builder.function("forward", [tokens, *self.weights.values()], attrs=attrs):
            with self.builder.dataflow():
                output = self.builder.emit_output(self._body(tokens))
            self.builder.emit_func_output(output)
        return self.builder.get()

    def _body(self, tokens: Expr) -> Expr:
        c, taps = self.c, []
        x = self.call("embedding", EmbeddingSpec(c.vocab, c.hidden, scale=1.5), self.weights["embed"], tokens)
        cos, sin = self._angles()
        for i in range(len(c.windows)):
            x = self.emit(op.add(x, self._attention(self.norm(x, f"l{i}.attn_norm"), i, cos, sin)))
            x = self._trouble(x, i)
            h = self.linear(self.norm(x, f"l{i}.mlp_norm"), f"l{i}.gate_up")
            h = self.linear(self.call("gated", GatedSpec(c.inter, "silu"), h), f"l{i}.down")
            x = self.emit(op.add(h, x))
            taps.append(x)
        logits = self.linear(self.norm(x, "norm"), "embed")
        if c.logits_scale is not None:  # NaN: by themselves
            by = logits if math.isnan(c.logits_scale) else relax.const(c.logits_scale, "float32")
            logits = self.emit(op.multiply(logits, by))
        return relax.Tuple([logits, *taps]) if c.taps else logits

    def _angles(self) -> tuple[Expr, Expr]:
        inverse = 10000.0 ** (-np.arange(0, self.c.head_dim, 2) / self.c.head_dim)
        positions = self.emit(op.astype(self.emit(op.arange(0, self.n, 1, dtype="int64")), "float32"))
        frequencies = relax.const(inverse.astype("float32")[None])
        angle = self.emit(op.multiply(self.emit(op.expand_dims(positions, 1)), frequencies))
        return self.emit(op.cos(angle)), self.emit(op.sin(angle))

    def _attention(self, h: Expr, i: int, cos: Expr, sin: Expr) -> Expr:
        c, n = self.c, self.n
        bounds = (0, c.q_size, c.q_size + c.kv_size, c.q_size + 2 * c.kv_size)
        if c.joint_qkv:
            joint = self.linear(h, f"l{i}.qkv")
            parts = [self.emit(op.strided_slice(joint, [1], [a], [b])) for a, b in pairwise(bounds)]
        else:
            parts = [self.linear(h, f"l{i}.{name}") for name in "qkv"]
        heads = (c.heads, c.kv_heads, c.kv_heads)
        q, k, v = (self.emit(op.reshape(p, (n, g, c.head_dim))) for p, g in zip(parts, heads, strict=True))
        if c.qk_norm:
            q, k = self.norm(q, f"l{i}.q_norm", 3), self.norm(k, f"l{i}.k_norm", 3)
        q = self.call("rope", RopeSpec(c.heads, c.head_dim), q, cos, sin)
        k = self.call("rope", RopeSpec(c.kv_heads, c.head_dim), k, cos, sin)
        causal = c.trouble != "bidirectional"
        window = c.windows[i] if causal else None
        scale = c.head_dim**-0.5
        spec = AttentionSpec(c.heads, c.kv_heads, c.head_dim, scale, causal, window, c.soft_cap, c.sinks)
        sinks = [self.weights[f"l{i}.sinks"]] if c.sinks else []
        out = self.emit(op.reshape(self.call("attention", spec, q, k, v, *sinks), (n, c.q_size)))
        return self.linear(out, f"l{i}.o")

    def _trouble(self, x: Expr, layer: int) -> Expr:
        """The residual stream after layer 1's attention, spoilt in the way that `trouble` names."""
        emit, n, hidden = self.emit, self.n, self.c.hidden
        if layer != 1 or self.c.trouble in (None, "bidirectional"):
            return x
        if self.c.trouble == "mean":
            return emit(op.subtract(x, emit(op.mean(x, axis=[0], keepdims=True))))
        if self.c.trouble == "concat":
            shifted = emit(op.concat([emit(op.zeros((1, hidden), "float32")), x], axis=0))
            return emit(op.add(x, emit(op.strided_slice(shifted, [0], [0], [n]))))
        if self.c.trouble == "reshape":
            return emit(op.reshape(emit(op.reshape(x, (hidden, n))), (n, hidden)))
        if self.c.trouble == "matmul":
            scores = emit(op.matmul(x, emit(op.permute_dims(x))))
            return emit(op.matmul(scores, x))
        if self.c.trouble == "softmax":
            return emit(op.nn.softmax(x, axis=0))
        if self.c.trouble == "cumsum":
            return emit(op.cumsum(x, axis=0))
        if self.c.trouble == "strided_slice":
            return emit(op.add(x, emit(op.strided_slice(x, [0], [0], [1]))))
        if self.c.trouble == "take":
            return emit(op.add(x, emit(op.take(x, relax.const(np.array([0])), axis=0))))
        if self.c.trouble == "sort":
            return emit(op.sort(x, axis=1))
        raise ValueError(self.c.trouble)


def random_params(func: relax.Function, rng: np.random.Generator) -> list[np.ndarray]:
    """Values for a function's weights, all plain float32: matrices around 0, vectors around 1."""
    shapes = [tuple(int(e) for e in p.ty.shape.values) for p in weight_params(func)]
    return [(rng.normal(size=s) * (0.3 if len(s) > 1 else 0.5) + (len(s) == 1)).astype("float32") for s in shapes]


class Compiled:
    """A module run by its reference bodies on llvm: numpy in, numpy out."""

    def __init__(self, mod: tvm.IRModule) -> None:
        executable = tvm.compile(mod, TARGET, relax_pipeline=relax.get_default_pipeline(TARGET))
        self.vm = relax.VirtualMachine(executable, tvm.cpu())

    def __call__(self, name: str, *args: Any) -> Any:
        result = self.vm[name](*[tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in args])
        return result.numpy() if hasattr(result, "numpy") else [r.numpy() for r in result]


def round_trip(mod: tvm.IRModule) -> None:
    """The module's text parses back to the same module."""
    tvm.ir.assert_structural_equal(mod, tvm.script.from_source(mod.script(show_meta=True)))


class Batch:
    """Sequences over one page pool, poisoned with NaN; `step` adds tokens to some and returns what `function` gives."""

    def __init__(
        self, mod: tvm.IRModule, params: list[np.ndarray], page_size: int, pages: int = 32, compiled: Any = None
    ) -> None:
        self.compiled, self.params, self.page_size = compiled or Compiled(mod), params, page_size
        pages_param = next(p for p in mod["logits"].params if p.name == "pages")
        shape = [int(e) if isinstance(e, tirx.IntImm) else pages for e in pages_param.ty.shape.values]
        self.pages = tvm.runtime.tensor(np.full(shape, np.nan, str(pages_param.ty.dtype)))
        self.free = list(np.random.default_rng(0).permutation(pages))
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}

    def step(
        self,
        request: dict[int, list[int]],
        all_rows: bool = False,
        function: str = "logits",
        sampling: dict[str, np.ndarray] | None = None,
    ) -> Any:
        tokens, positions, slots, rows = [], [], [], []
        indptr, page_indptr, page_indices, kv_len = [0], [0], [], []
        for sequence, new in request.items():
            table, old = self.tables.setdefault(sequence, []), self.tokens.setdefault(sequence, [])
            for token in new:
                position = len(old)
                if position % self.page_size == 0:
                    table.append(int(self.free.pop()))
                slots.append(table[-1] * self.page_size + position % self.page_size)
                tokens.append(token)
                positions.append(position)
                old.append(token)
            indptr.append(len(tokens))
            page_indices += table
            page_indptr.append(len(page_indices))
            kv_len.append(len(old))
            rows += range(indptr[-2], indptr[-1]) if all_rows else [indptr[-1] - 1]
        step = [tokens, positions, slots, indptr, page_indptr, page_indices, kv_len, [0] * len(kv_len), rows]
        extra = [sampling[name] for name in SAMPLING_INPUTS] if sampling else []
        inputs = [np.array(a, "int32") for a in step]
        return self.compiled(function, *inputs, *extra, self.pages, *self.params)


def assert_same_steps(before: tvm.IRModule, after: tvm.IRModule, c: Tiny, page_size: int = 4) -> None:
    """Two forms of one model give the same logits for a prefill of two sequences, a chunk and a decode step."""
    rng = np.random.default_rng()
    params = random_params(before["logits"], rng)
    batches = [Batch(mod, params, page_size) for mod in (before, after)]
    for lengths, all_rows in (({0: 6, 1: 1}, True), ({1: 5, 0: 2}, False), ({0: 1, 1: 1}, False)):
        request = {s: rng.integers(0, c.vocab, n).tolist() for s, n in lengths.items()}
        expected, actual = (batch.step(request, all_rows) for batch in batches)
        assert_close(actual, expected)


def composite_names(mod: tvm.IRModule, function: str = "logits") -> list[str]:
    """The composites that a function calls, in order."""
    found = [composite_of(mod, b.value) for b in bindings(mod[function])]
    return [f[0] for f in found if f is not None]
