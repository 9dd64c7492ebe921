"""The closed list of composites: what a fused operator is, as frozen values.

A composite is a call to a private Relax function that carries two attributes:

    tw.composite   its name, a key of `SPECS`
    tw.spec        the spec below as JSON

and a reference body made from the spec alone, so that the IR runs at every stage and every kernel has something to be
checked against. Shapes are written with n or t (tokens), H (query heads), G (KV heads), D (head size), r (wanted rows).

| composite | arguments | result | stage |
|---|---|---|---|
| attention | q[n,H,D] k[n,G,D] v[n,G,D] (sinks[H]) | [n,H,D] | fused |
| rope | x[n,h,D] cos[n,D/2] sin[n,D/2] | [n,h,D] | fused, served |
| rms_norm | x[...,K] weight[K] | [...,K] | fused, served |
| gated | x[n,2I] = gate, up side by side | [n,I] | fused, served |
| linear | x[n,K] weight[N,K] (bias[N]) | [n,N] | fused, served |
| embedding | table[V,K] tokens[n] | [n,K] | fused, served |
| kv_append | pages k[t,G,D] v[t,G,D] slots[t] layer | pages | served |
| paged_attention | q[t,H,D] pages, positions to phases of `STEP_INPUTS` but slots, layer (sinks) | [t,H,D] | served |
| angles | positions[t] frequencies[D/2] | (cos[t,D/2], sin[t,D/2]) | served, on a GPU |
| qkv_append | qkv[t,(H+2G)D] cos sin (q_norm[D] k_norm[D]) pages slots layer | (q[t,H,D], pages) | served |
| sample | logits[r,V] and `SAMPLING_INPUTS` | (ids[r], logprobs[r], top_ids[r,L], top_logprobs[r,L]) | served |
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionSpec:
    """softmax(scale * q k^T + mask) v. `window`: a query at i sees keys j with i - window < j <= i. `sinks`: each head
    has one more score, without a value, in the sum that weights are divided by (Xiao et al. 2024; learned, in float32
    and not scaled, as in gpt-oss)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """Rotation of the pairs (i, i + D/2) ("half"): [a*cos - b*sin, b*cos + a*sin]. Su et al. 2021."""

    heads: int
    head_dim: int


@dataclass(frozen=True)
class AnglesSpec:
    """cos and sin of position * frequency, in float32, for rotations of heads of size D = head_dim."""

    head_dim: int


@dataclass(frozen=True)
class NormSpec:
    """x * rsqrt(mean(x^2, -1) + eps) * weight. Zhang and Sennrich 2019. The weight is float32 whatever `dtype` says."""

    features: int
    eps: float
    dtype: str = "float32"


@dataclass(frozen=True)
class GatedSpec:
    """activation(x[:, :I]) * x[:, I:] with I = features. Shazeer 2020."""

    features: int
    activation: str  # "silu" | "gelu_tanh"
    dtype: str = "float32"


@dataclass(frozen=True)
class LinearSpec:
    """y = prologue(x) @ weight.T (+ bias), gated if `gate`, (+ residual).

    `weight_format` names the layout of the weight parameter: a dtype ("f32", "f16", "bf16") or a block format ("q4_0",
    "q4_1", "q8_0"). Up to quantize_weights it is always "f32" with a plain [N, K] tensor; after it, a packed one
    (models/quant). With a prologue x is the prologue's input and the norm's weight follows `weight` in the arguments:
    x, weight, [norm_weight], [bias], [residual[n,N]]. `gated` is a gate before the product, `gate` one after it: the
    result has half of the N columns then, activation(y[:, :N/2]) * y[:, N/2:], and so has the residual.

    x and the residual are of `dtype`, the result of `out_dtype`; norm weight and bias are float32.

    `activation_bits`, 8 or 16, is the width of the integers that kernels of block formats round activations to, a block
    of 32 at a time; 16 costs twice the products. Dense formats and the reference bodies take activations as they are.
    """

    out_features: int
    in_features: int
    weight_format: str = "f32"
    bias: bool = False
    norm: NormSpec | None = None
    gated: GatedSpec | None = None
    residual: bool = False
    activation_bits: int = 16
    gate: GatedSpec | None = None
    dtype: str = "float32"
    out_dtype: str = "float32"

    @property
    def result_features(self) -> int:
        """Columns of the result, and of the residual."""
        return self.out_features // 2 if self.gate else self.out_features


@dataclass(frozen=True)
class EmbeddingSpec:
    """table[tokens] * scale."""

    vocab: int
    features: int
    weight_format: str = "f32"
    scale: float = 1.0
    dtype: str = "float32"


@dataclass(frozen=True)
class KVFormat:
    """pages[layer, page, 2, kv_head, page_size * head_dim]: one tensor for all layers, K at index 0, V at 1.

    Inside a page and head, V is [slot, dim]; K is [dim, slot] where `k_transposed` (CPU: a vector of 16 slots a load)
    and [slot, dim] elsewhere.
    """

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str = "float32"
    k_transposed: bool = True


@dataclass(frozen=True)
class AppendSpec:
    """pages[layer, slots[t] // page_size, :, :, slots[t] % page_size] = k[t], v[t]; a slot below 0 is skipped."""

    kv: KVFormat


@dataclass(frozen=True)
class PagedAttentionSpec:
    """Ragged attention of t query tokens in b sequences over the pages of each; query i sees keys 0..positions[i].

    A kernel may treat prompt tokens and generated ones (`phases`) in different ways, so that neither depends on how a
    prompt is cut into chunks; where `strict`, it must not.
    """

    attention: AttentionSpec
    kv: KVFormat
    dtype: str = "float32"
    strict: bool = False


@dataclass(frozen=True)
class QKVAppendSpec:
    """Split a joint projection, normalise q and k per head if `norm`, rotate both, append k and v, return q."""

    heads: int
    kv: KVFormat
    norm: NormSpec | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class SampleSpec:
    """Penalties, bias, temperature, top-k, top-p, min-p, draw; see passes/lower_sampling.py for the exact order."""

    vocab: int
    top_logprobs: int = 20


# The sampler's inputs after the logits, in order: name -> (symbolic shape, dtype). r rows; lists have their own size.
SAMPLING_INPUTS: dict[str, tuple[str, str]] = {
    "temperature": ("r", "float32"),  # 0: greedy
    "top_k": ("r", "int32"),  # 0: off
    "top_p": ("r", "float32"),  # 1: off
    "min_p": ("r", "float32"),  # 0: off
    "repetition_penalty": ("r", "float32"),  # 1: off
    "presence_penalty": ("r", "float32"),
    "frequency_penalty": ("r", "float32"),
    "seeds": ("r", "int64"),
    "draws": ("r", "int32"),  # how many tokens this request has drawn before: the counter of the random stream
    "penalty_indptr": ("r+1", "int32"),
    "penalty_tokens": ("c", "int32"),  # every distinct token of prompt and output
    "penalty_counts": ("c", "int32"),  # how often it stands in the output (0: only in the prompt)
    "bias_indptr": ("r+1", "int32"),
    "bias_tokens": ("e", "int32"),
    "bias_values": ("e", "float32"),  # -inf bans a token
    "alternatives": ("r", "int32"),  # how many of the most likely tokens are wanted; the rest of theirs is unspecified
}

# The step's inputs before the sampler's: name -> (symbolic shape, dtype). t tokens, b sequences, p page entries.
STEP_INPUTS: dict[str, tuple[str, str]] = {
    "tokens": ("t", "int32"),
    "positions": ("t", "int32"),
    "slots": ("t", "int32"),  # page * page_size + offset for each new token
    "indptr": ("b+1", "int32"),  # tokens of sequence i: indptr[i]..indptr[i+1]
    "page_indptr": ("b+1", "int32"),
    "page_indices": ("p", "int32"),  # p >= page_indptr[b]
    "kv_len": ("b", "int32"),  # tokens in the cache of each sequence after this step's append
    "phases": ("b", "int32"),  # 0: the sequence's tokens are its prompt's, 1: a generated one
    "rows": ("r", "int32"),  # which of the t tokens want logits; a row may be named more than once
}

SPECS: dict[str, type] = {
    "attention": AttentionSpec,
    "rope": RopeSpec,
    "rms_norm": NormSpec,
    "gated": GatedSpec,
    "linear": LinearSpec,
    "embedding": EmbeddingSpec,
    "kv_append": AppendSpec,
    "paged_attention": PagedAttentionSpec,
    "angles": AnglesSpec,
    "qkv_append": QKVAppendSpec,
    "sample": SampleSpec,
}

_NESTED: dict[str, type] = {
    "norm": NormSpec,
    "gated": GatedSpec,
    "gate": GatedSpec,
    "kv": KVFormat,
    "attention": AttentionSpec,
}


def dump_spec(spec: Any) -> str:
    """The spec as JSON with sorted keys: equal specs give equal text."""
    return json.dumps(dataclasses.asdict(spec), sort_keys=True)


def load_spec(composite: str, text: str) -> Any:
    """The frozen spec back from `dump_spec`'s text."""
    return _build(SPECS[composite], json.loads(str(text)))


def _build(cls: type, fields: dict[str, Any]) -> Any:
    nested = {k: _build(_NESTED[k], v) if isinstance(v, dict) else v for k, v in fields.items()}
    return cls(**nested)
