"""What a configuration implies: which parameters there are, in which order, of which shape; and what can't be.

Front ends check their tensors against `parameter_shapes`, families write their mathematics over it: one list for both.
"""

from collections.abc import Mapping

from tilewright.compiler.checkpoint import LazyTensor, ModelConfig, Rope
from tilewright.compiler.errors import ModelError

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
_HEAD_NORM_FAMILIES = ("qwen3", "gemma3")
_SANDWICH_FAMILIES = ("gemma3",)
ACTIVATIONS = ("silu", "gelu_tanh")

# Kinds of rope scaling and the numbers each needs (compare models/layers.py, which computes them).
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "factors": ("factors",),  # one divisor for each frequency
}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name (compiler/checkpoint.py), in the order of the model's arguments."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab, config.hidden)}
    for layer in range(config.layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _layer_shapes(config).items()}
    shapes["norm.weight"] = (config.hidden,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, config.hidden)
    return shapes


def _layer_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (c.hidden,)}
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        shapes |= _linear(f"attn.{name}", rows, c.hidden, c.attention_bias)
    if c.qk_norm:
        shapes |= {"attn.q_norm.weight": (c.head_dim,), "attn.k_norm.weight": (c.head_dim,)}
    shapes |= _linear("attn.o", c.hidden, queries, c.output_bias)
    if c.sandwich_norms:
        shapes["attn_post_norm.weight"] = (c.hidden,)
    shapes["mlp_norm.weight"] = (c.hidden,)
    for name, rows, columns in (
        ("gate", c.intermediate, c.hidden),
        ("up", c.intermediate, c.hidden),
        ("down", c.hidden, c.intermediate),
    ):
        shapes |= _linear(f"mlp.{name}", rows, columns, c.mlp_bias)
    if c.sandwich_norms:
        shapes["mlp_post_norm.weight"] = (c.hidden,)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def check_config(config: ModelConfig, source: str) -> None:
    """Raises ModelError where `config`, read from `source` (named in the message), contradicts itself."""
    for field in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "max_position"):
        value = getattr(config, field)
        _check(type(value) is int and value > 0, source, f"{field} is {value!r}, but must be a whole number above 0")
    _check(
        config.heads % config.kv_heads == 0,
        source,
        f"{config.heads} attention heads can't be shared among {config.kv_heads} KV heads; one must divide the other",
    )
    _check(config.head_dim % 2 == 0, source, f"head_dim is {config.head_dim}, but rotary pairs need an even one")
    _check(_positive(config.norm_eps), source, f"norm_eps is {config.norm_eps!r}, but must be a number above 0")
    _check(
        config.activation in ACTIVATIONS,
        source,
        f"the activation {config.activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}",
    )
    _check(
        config.qk_norm == (config.family in _HEAD_NORM_FAMILIES)
        and config.sandwich_norms == (config.family in _SANDWICH_FAMILIES),
        source,
        f"qk_norm {config.qk_norm} with sandwich_norms {config.sandwich_norms} is no {config.family} model",
    )
    for rope in (config.rope, config.window_rope):
        if rope is not None:
            _check_rope(rope, config.head_dim, source)
    _check_windows(config, source)


def _check_rope(rope: Rope, head_dim: int, source: str) -> None:
    _check(_positive(rope.theta), source, f"rope theta is {rope.theta!r}, but must be a number above 0")
    if not rope.scaling:
        return
    scaling = dict(rope.scaling)
    kind = scaling.get("type")
    known = ", ".join(k for k in ROPE_SCALINGS if k != "factors")
    _check(kind in ROPE_SCALINGS, source, f"rope scaling {kind!r} is not supported; supported are {known}")
    for name in ROPE_SCALINGS[str(kind)]:
        _check(name in scaling, source, f"rope scaling {kind!r} has no {name!r}; add it")
        values = scaling[name] if isinstance(scaling[name], tuple) else (scaling[name],)
        for value in values:
            _check(_positive(value), source, f"{name!r} of rope scaling {kind!r} is {value!r}, but must be above 0")
    if kind == "factors":
        count = len(scaling["factors"])
        _check(count == head_dim // 2, source, f"there are {count} rope factors, but {head_dim // 2} frequencies")


def _check_windows(config: ModelConfig, source: str) -> None:
    if config.window_layers:
        _check(
            type(config.window) is int and config.window > 0,
            source,
            f"{len(config.window_layers)} layers attend to a sliding window of size {config.window!r}, "
            "but it must be a whole number above 0",
        )
        last = max(config.window_layers)
        _check(last < config.layers, source, f"layer {last} is named as sliding, but there are {config.layers} layers")


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _check(condition: bool, source: str, sentence: str) -> None:
    if not condition:
        raise ModelError(f"{source}: {sentence}")


def check_tensors(config: ModelConfig, tensors: Mapping[str, LazyTensor], source: str) -> None:
    """Raises ModelError where a parameter is missing, of a wrong shape, or one more than `config` asks for."""
    expected = parameter_shapes(config)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ModelError(f"{source}: weight {missing[0]!r}{_more(missing)} missing; the file is incomplete")
    extra = [name for name in tensors if name not in expected]
    if extra:
        raise ModelError(
            f"{source}: weight {extra[0]!r}{_more(extra)} not known to a {config.family} model of this configuration; "
            "the model differs from its family and would compute something else"
        )
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise ModelError(f"{source}: weight {name!r} has shape {found}, but the configuration says {shape}")


def _more(names: list[str]) -> str:
    """The verb after the first name of a list: " is", or " (and 3 more) are"."""
    return " is" if len(names) == 1 else f" (and {len(names) - 1} more) are"
