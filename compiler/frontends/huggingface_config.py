"""config.json of a Hugging Face model -> ModelConfig.

Both spellings are read: rope_theta and rope_scaling at the top, and rope_parameters (transformers 5). Whatever would
change the mathematics and is not supported is refused, never skipped.
"""

import math
from collections.abc import Mapping
from typing import Any

from tilewright.compiler.checkpoint import ModelConfig, Rope, most_of
from tilewright.compiler.errors import ModelError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# What transformers assumes where a configuration is silent; text parts of larger gemma3 models are.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6},
    "qwen2": {"hidden_act": "silu", "rms_norm_eps": 1e-6},
    "qwen3": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "head_dim": 128},
    "gemma3": {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
}
_DEFAULT_THETA = 10000.0
# Fields that change the mathematics in ways no family here has; they must be absent, null or this.
_UNSUPPORTED: dict[str, Any] = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
}


def read_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """The configuration in `raw`, the parsed config.json that `source` names. ModelError where it can't be served."""
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named or None
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ModelError(
            f"{source}: architecture {architecture!r} is not supported; supported families are llama "
            f"({', '.join(name for name, family in ARCHITECTURES.items() if family == 'llama')}), qwen2, qwen3, gemma3"
        )
    family = ARCHITECTURES[architecture]
    if isinstance(raw.get("text_config"), Mapping):
        raw = {"tie_word_embeddings": raw.get("tie_word_embeddings", True)} | dict(raw["text_config"])
    fields = _Fields(family, raw, source)
    fields.refuse_unsupported()
    return _FAMILIES[architecture](fields)


class _Fields:
    """Fields of a configuration, with transformers' defaults for the family; null counts as absent."""

    def __init__(self, family: str, raw: Mapping[str, Any], source: str) -> None:
        self.family, self.source = family, source
        self.values = _DEFAULTS[family] | {k: v for k, v in raw.items() if v is not None}

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        return self._typed(name, default, int, "a whole number")

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._typed(name, default, (int, float), "a number"))

    def mapping(self, name: str) -> Mapping[str, Any]:
        return self._typed(name, {}, Mapping, "an object")

    def flag(self, name: str) -> bool:
        return self._typed(name, False, bool, "true or false")

    def _typed(self, name: str, default: Any, kind: Any, meaning: str) -> Any:
        value = self.values.get(name, default)
        if value is None:
            raise ModelError(f"{self.source}: field {name!r} is missing; a {self.family} model needs it")
        infinite = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or infinite:
            raise ModelError(f"{self.source}: field {name!r} is {value!r}, but must be {meaning}")
        if isinstance(value, int) and value > most_of(name):
            raise ModelError(
                f"{self.source}: field {name!r} is {str(value)[:20]}, above {most_of(name)}, the most there is"
            )
        return value

    def refuse_unsupported(self) -> None:
        for name, neutral in _UNSUPPORTED.items():
            if self.get(name, neutral) != neutral:
                raise ModelError(f"{self.source}: field {name!r} is {self.get(name)!r}, which is not supported")


def _common(f: _Fields) -> dict[str, Any]:
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    return {
        "family": f.family,
        "hidden": hidden,
        "layers": f.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": f.integer("num_key_value_heads", heads),
        "head_dim": f.integer("head_dim", 0) or _head_dim(f, hidden, heads),
        "intermediate": f.integer("intermediate_size"),
        "vocab": f.integer("vocab_size"),
        "norm_eps": f.number("rms_norm_eps"),
        "rope": _rope(f, "full_attention", "rope_theta"),
        "max_position": f.integer("max_position_embeddings"),
        "tied": f.flag("tie_word_embeddings"),
        "activation": _activation(f),
    }


def _llama(f: _Fields) -> ModelConfig:
    bias = f.flag("attention_bias")
    return ModelConfig(**_common(f), attention_bias=bias, output_bias=bias, mlp_bias=f.flag("mlp_bias"))


def _mistral(f: _Fields) -> ModelConfig:
    return ModelConfig(**_common(f), **_windows(f, lambda layer: True))


def _qwen2(f: _Fields) -> ModelConfig:
    return ModelConfig(**_common(f), **_qwen_windows(f), attention_bias=True)


def _qwen3(f: _Fields) -> ModelConfig:
    bias = f.flag("attention_bias")
    return ModelConfig(**_common(f), **_qwen_windows(f), qk_norm=True, attention_bias=bias, output_bias=bias)


def _gemma3(f: _Fields) -> ModelConfig:
    bias, pattern = f.flag("attention_bias"), f.integer("sliding_window_pattern")
    scalar = f.number("query_pre_attn_scalar")
    if scalar <= 0 or pattern < 1:
        raise ModelError(
            f"{f.source}: query_pre_attn_scalar is {scalar} and sliding_window_pattern {pattern}; both must be above 0"
        )
    return ModelConfig(
        **_common(f),
        **_windows(f, lambda layer: (layer + 1) % pattern != 0),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
        sandwich_norms=True,
        attention_scale=scalar**-0.5,
        window_rope=_rope(f, "sliding_attention", "rope_local_base_freq"),
        embed_scale=f.integer("hidden_size") ** 0.5,
    )


_FAMILIES = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3,
}


def _head_dim(f: _Fields, hidden: int, heads: int) -> int:
    if heads < 1 or hidden % heads:
        raise ModelError(
            f"{f.source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; "
            "correct one of them or add head_dim"
        )
    return hidden // heads


def _activation(f: _Fields) -> str:
    name = f.get("hidden_activation" if f.family == "gemma3" else "hidden_act")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ModelError(
            f"{f.source}: activation {name!r} is not supported; supported are {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


def _qwen_windows(f: _Fields) -> dict[str, Any]:
    if not f.flag("use_sliding_window"):
        return {}
    first = f.integer("max_window_layers", 28)
    return _windows(f, lambda layer: layer >= first)


def _windows(f: _Fields, slides: Any) -> dict[str, Any]:
    """window and window_layers: the layer types that are named, else those that `slides(layer)` says."""
    if f.get("sliding_window") is None:
        return {}
    layers = f.integer("num_hidden_layers")
    types = f.get("layer_types", ["sliding_attention" if slides(i) else "full_attention" for i in range(layers)])
    if not isinstance(types, list):
        raise ModelError(f"{f.source}: field 'layer_types' is {types!r}, but must be a list")
    unknown = [t for t in types if t not in ("sliding_attention", "full_attention")]
    if unknown:
        raise ModelError(f"{f.source}: layer type {unknown[0]!r} is not supported; full and sliding attention are")
    if len(types) != layers:
        raise ModelError(f"{f.source}: layer_types names {len(types)} layers, but num_hidden_layers is {layers}")
    sliding = tuple(i for i, t in enumerate(types) if t == "sliding_attention")
    return {"window": f.integer("sliding_window"), "window_layers": sliding} if sliding else {}


def _rope(f: _Fields, layer_type: str, theta_field: str) -> Rope:
    """Rope of one layer type. Of gemma3's old spelling, rope_scaling counts for the layers with full attention only."""
    parameters = f.mapping("rope_parameters")
    if isinstance(parameters.get(layer_type), Mapping):
        parameters = parameters[layer_type]
    elif not parameters and layer_type == "full_attention":
        parameters = f.mapping("rope_scaling")
    theta = parameters.get("rope_theta", f.get(theta_field, _DEFAULT_THETA))
    if not isinstance(theta, int | float):
        raise ModelError(f"{f.source}: field {theta_field!r} is {theta!r}, but must be a number")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{f.source}: rotary pairs for a part of the head only are not supported")
    return Rope(float(theta), _scaling(f, parameters))


def _scaling(f: _Fields, parameters: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return ()
    scaling = {k: v for k, v in parameters.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", f.integer("max_position_embeddings"))
    return (("type", kind), *sorted(scaling.items()))
