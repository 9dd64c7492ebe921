"""A model as a front end hands it over: configuration, named tensors that load on demand, tokenizer, template.

Front ends (compiler/frontends) make a `Checkpoint`; families (models/) read `ModelConfig`; the build packs the tensors.
Tensor names are ours, the same for every source:

    embed.weight[V,K]  norm.weight[K]  lm_head.weight[V,K] (absent when tied)
    layers.{i}.attn_norm.weight  layers.{i}.attn.{q,k,v,o}.weight (.bias)  layers.{i}.attn.{q,k}_norm.weight
    layers.{i}.mlp_norm.weight   layers.{i}.mlp.{gate,up,down}.weight
    layers.{i}.attn_post_norm.weight  layers.{i}.mlp_post_norm.weight      (sandwich norms)

Rotary weights are in "half" order (pairs i, i + D/2); norm weights multiply as they are (a "1 + w" is folded in here).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DENSE_FORMATS = ("f32", "f16", "bf16")
BLOCK_FORMATS = ("q4_0", "q4_1", "q8_0")  # 32 weights along K a block; kept packed end to end


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: theta, and an optional scaling of them ("linear", "llama3", "yarn" ...) with its numbers."""

    theta: float
    scaling: tuple[tuple[str, Any], ...] = ()


MAX_LAYERS = 1000  # lists are made of them before anything else could show that they are not there


def most_of(name: str) -> int:
    """The largest number that a field of a configuration may have. name: as files spell it."""
    return MAX_LAYERS if name in ("num_hidden_layers", "block_count") else 2**31 - 1


@dataclass(frozen=True)
class ModelConfig:
    """Everything a family needs to write its mathematics down. Sizes in elements; checked in compiler/parameters.py."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope: Rope
    max_position: int
    tied: bool = True
    attention_bias: bool = False  # q, k, v
    output_bias: bool = False  # o
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False  # a norm after attention and after the MLP as well, before the residual is added
    activation: str = "silu"
    attention_scale: float | None = None  # default head_dim ** -0.5
    window: int | None = None  # sliding window of the layers named below
    window_layers: tuple[int, ...] = ()
    window_rope: Rope | None = None  # rope of those layers, where it differs
    embed_scale: float = 1.0


@dataclass(frozen=True)
class LazyTensor:
    """One weight, read when asked for. `format`: a dense dtype, a block format, or the source's own name for others.

    `read()` gives float32 of `shape`; `read_raw()` gives, for DENSE_FORMATS, the array in that dtype, and for
    BLOCK_FORMATS uint8[rows, blocks, bytes of a block] exactly as in the file (rows already in our order).
    """

    shape: tuple[int, ...]
    format: str
    read: Callable[[], np.ndarray]
    read_raw: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class TokenizerFiles:
    """What the artifact's tokenizer needs: Hugging Face's tokenizer.json as text, and the chat settings."""

    tokenizer_json: str
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # end of sequence, end of turn


@dataclass(frozen=True)
class Checkpoint:
    name: str
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    tokenizer: TokenizerFiles | None
    source: Mapping[str, str] = field(default_factory=dict)  # provenance: kind, file name, sha256
