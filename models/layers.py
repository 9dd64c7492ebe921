"""The words that models are written in: each method emits plain operators for one sequence of n tokens.

No cache, no batch, no target: passes add those. Numbers are float32. The order of operations follows transformers, so
that both round alike.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tvm import relax

from tilewright.compiler.checkpoint import ModelConfig, Rope

op = relax.op
Tensor: TypeAlias = Any  # a relax expression

# What a masked score becomes: far below any score, and finite, since constants of -inf do not legalise.
MASKED = -1e30


@dataclass(frozen=True)
class Rotation:
    """cos, sin: f32[n, D/2], one row for each position."""

    cos: Tensor
    sin: Tensor


class Layers:
    """Emits into the block builder's current dataflow block; `params` are the model's parameters by name."""

    def __init__(self, builder: relax.BlockBuilder, params: Mapping[str, Tensor], config: ModelConfig) -> None:
        self.emit, self.params, self.config = builder.emit, params, config

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens i32[n] -> f32[n, hidden]."""
        rows = self.emit(op.take(self.params["embed.weight"], tokens, axis=0, mode="clip"))
        scale = self.config.embed_scale
        return rows if scale == 1.0 else self.emit(op.multiply(rows, _constant(scale)))

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x f32[n, K] -> f32[n, N]: x @ weight.T, plus the bias where the model has one."""
        y = self.emit(op.matmul(x, self.emit(op.permute_dims(self.params[f"{name}.weight"]))))
        bias = self.params.get(f"{name}.bias")
        return y if bias is None else self.emit(op.add(y, bias))

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        """x f32[..., K] -> f32[..., K]: x / rms(x) * weight. Zhang and Sennrich 2019."""
        mean = self.emit(op.mean(self.emit(op.multiply(x, x)), axis=[-1], keepdims=True))
        scale = self.emit(op.rsqrt(self.emit(op.add(mean, _constant(self.config.norm_eps)))))
        return self.emit(op.multiply(self.emit(op.multiply(x, scale)), self.params[f"{name}.weight"]))

    def positions(self, n: Any) -> Tensor:
        """i64[n]: 0, 1, 2 ..."""
        return self.emit(op.arange(0, n, 1, dtype="int64"))

    def rotation(self, positions: Tensor, rope: Rope) -> Rotation:
        """The angles position * frequency, as cosines and sines. Su et al. 2021."""
        frequencies, scale = rope_frequencies(rope, self.config.head_dim)
        steps = self.emit(op.expand_dims(self.emit(op.astype(positions, "float32")), 1))
        angles = self.emit(op.multiply(steps, relax.const(frequencies[None, :])))
        cos, sin = self.emit(op.cos(angles)), self.emit(op.sin(angles))
        if scale != 1.0:
            cos, sin = (self.emit(op.multiply(t, _constant(scale))) for t in (cos, sin))
        return Rotation(cos, sin)

    def rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x f32[n, h, D] -> the same, its pairs (i, i + D/2) turned by the angles."""
        half = self.config.head_dim // 2
        a = self.emit(op.strided_slice(x, [2], [0], [half]))
        b = self.emit(op.strided_slice(x, [2], [half], [2 * half]))
        cos, sin = (self.emit(op.expand_dims(t, 1)) for t in (rotation.cos, rotation.sin))
        first = self.emit(op.subtract(self._times(a, cos), self._times(b, sin)))
        second = self.emit(op.add(self._times(b, cos), self._times(a, sin)))
        return self.emit(op.concat([first, second], axis=-1))

    def mask(self, positions: Tensor, window: int | None = None) -> Tensor:
        """bool[n, n]: whether query i sees key j: j <= i, and i - j < window where there is one."""
        i, j = (self.emit(op.expand_dims(positions, axis)) for axis in (1, 0))
        causal = self.emit(op.less_equal(j, i))
        if window is None:
            return causal
        near = self.emit(op.less(self.emit(op.subtract(i, j)), relax.const(window, "int64")))
        return self.emit(op.logical_and(causal, near))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q f32[n, H, D], k, v f32[n, G, D] -> f32[n, H * D]: softmax(q k^T * scale, masked) v in every head.

        KV head g serves the query heads g * H/G up to (g + 1) * H/G. Ainslie et al. 2023.
        """
        c = self.config
        repeats = c.heads // c.kv_heads
        if repeats > 1:
            k, v = (self.emit(op.repeat(t, repeats, axis=1)) for t in (k, v))
        q, k, v = (self.emit(op.permute_dims(t, [1, 0, 2])) for t in (q, k, v))
        scores = self.emit(op.matmul(q, self.emit(op.permute_dims(k, [0, 2, 1]))))
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        scores = self.emit(op.multiply(scores, _constant(scale)))
        scores = self.emit(op.where(mask, scores, _constant(MASKED)))
        out = self.emit(op.matmul(self.emit(op.nn.softmax(scores, axis=-1)), v))
        out = self.emit(op.permute_dims(out, [1, 0, 2]))
        return self.emit(op.reshape(out, (out.ty.shape[0], c.heads * c.head_dim)))

    def heads(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """x f32[n, hidden] -> q f32[n, H, D], k and v f32[n, G, D]."""
        c, n = self.config, x.ty.shape[0]
        parts = (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
        q, k, v = (
            self.emit(op.reshape(self.linear(x, f"{name}.{part}"), (n, heads, c.head_dim))) for part, heads in parts
        )
        return q, k, v

    def gated_mlp(self, x: Tensor, name: str) -> Tensor:
        """x f32[n, hidden] -> f32[n, hidden]: down(activation(gate(x)) * up(x)). Shazeer 2020."""
        activation = {"silu": op.nn.silu, "gelu_tanh": op.nn.gelu_tanh}[self.config.activation]
        gate = self.emit(activation(self.linear(x, f"{name}.gate")))
        return self.linear(self._times(gate, self.linear(x, f"{name}.up")), f"{name}.down")

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self.emit(op.add(a, b))

    def logits(self, x: Tensor) -> Tensor:
        """x f32[n, hidden] -> f32[n, V], by the embedding table where the model ties the two."""
        return self.linear(x, "embed" if self.config.tied else "lm_head")

    def _times(self, a: Tensor, b: Tensor) -> Tensor:
        return self.emit(op.multiply(a, b))


# (words, x f32[n, hidden], the layer's name, its rotation, its mask) -> f32[n, hidden]
LayerFunction: TypeAlias = Callable[[Layers, Tensor, str, Rotation, Tensor], Tensor]


def decoder(layers: Layers, tokens: Tensor, layer: LayerFunction) -> tuple[Tensor, Sequence[Tensor]]:
    """tokens i32[n] -> (logits f32[n, V], hidden states f32[n, hidden] after each layer).

    Embedding, `layer` after `layer`, a last norm, logits. Rotations and masks are made once for each kind of layer,
    full or sliding.
    """
    c = layers.config
    positions = layers.positions(tokens.ty.shape[0])
    kinds = {index in c.window_layers for index in range(c.layers)}
    ropes = {False: c.rope, True: c.window_rope or c.rope}
    rotations = {
        rope: layers.rotation(positions, rope) for rope in dict.fromkeys(ropes[kind] for kind in sorted(kinds))
    }
    masks = {kind: layers.mask(positions, c.window if kind else None) for kind in sorted(kinds)}
    x, hidden = layers.embed(tokens), []
    for index in range(c.layers):
        kind = index in c.window_layers
        x = layer(layers, x, f"layers.{index}", rotations[ropes[kind]], masks[kind])
        hidden.append(x)
    return layers.logits(layers.rms_norm(x, "norm")), hidden


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """(radians a position f32[D/2], factor of cosines and sines) after the rope's scaling.

    In float32 throughout, as transformers computes them. ModelConfig's scaling has been through `check_config`.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(rope.theta) ** exponents
    scaling = dict(rope.scaling)
    return _SCALINGS[scaling.get("type")](frequencies, scaling, rope.theta)


def _unscaled(frequencies: np.ndarray, scaling: dict, theta: float) -> tuple[np.ndarray, float]:
    return frequencies, 1.0


def _linear(frequencies: np.ndarray, scaling: dict, theta: float) -> tuple[np.ndarray, float]:
    """Positions closer together. Chen et al. 2023."""
    return frequencies / np.float32(scaling["factor"]), 1.0


def _factors(frequencies: np.ndarray, scaling: dict, theta: float) -> tuple[np.ndarray, float]:
    """A divisor for each frequency, as GGUF files of Llama 3.x hold them."""
    return frequencies / np.array(scaling["factors"], np.float32), 1.0


def _llama3(frequencies: np.ndarray, scaling: dict, theta: float) -> tuple[np.ndarray, float]:
    """Long waves divided, short ones kept, a smooth way between. Llama 3.1."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * frequencies / np.float32(factor) + smooth * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / np.float32(factor), blended)
    return np.where(wavelengths < context / high, frequencies, scaled).astype(np.float32), 1.0


def _yarn(frequencies: np.ndarray, scaling: dict, theta: float) -> tuple[np.ndarray, float]:
    """Interpolated below, kept above, a ramp between, and warmer attention. Peng et al. 2023."""
    factor, half = scaling["factor"], len(frequencies)

    def dimension(turns: float) -> float:
        """The pair that turns so often over the original context."""
        context = scaling["original_max_position_embeddings"]
        return half * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first or 0.001
    ramp = np.clip((np.arange(half, dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
    scaled = frequencies / np.float32(factor) * ramp + frequencies * (1 - ramp)
    return scaled.astype(np.float32), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: dict) -> float:
    def warmth(weight: float) -> float:
        factor = scaling["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return warmth(scaling["mscale"]) / warmth(scaling["mscale_all_dim"])
    return warmth(1.0)


_SCALINGS = {None: _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "factors": _factors}


def _constant(value: float) -> Tensor:
    return relax.const(value, "float32")
