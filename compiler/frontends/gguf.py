"""A GGUF file as a checkpoint: metadata -> configuration and tokenizer, tensors -> our names and row order.

GGUF stores the rows of q and k of the architecture "llama" for interleaved rotary pairs (2i, 2i + 1); here they are put
back in "half" order. Blocks lie along K, so moving whole rows leaves them intact. The "1 + w" of gemma3's norms is
already in the file.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.compiler.artifact import sha256
from tilewright.compiler.checkpoint import BLOCK_FORMATS, Checkpoint, LazyTensor, ModelConfig, Rope, most_of
from tilewright.compiler.errors import ModelError
from tilewright.compiler.frontends.gguf_file import GGUFFile, GGUFTensor, read_gguf_file
from tilewright.compiler.frontends.gguf_tokenizer import read_tokenizer
from tilewright.compiler.parameters import FAMILIES, check_config, check_tensors

_DENSE = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}

_TOP_NAMES = {"token_embd": "embed", "output_norm": "norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.o",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "post_attention_norm": "attn_post_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
    "post_ffw_norm": "mlp_post_norm",
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.x: a divisor for each frequency

# What llama.cpp assumes for gemma3, whose files don't say it.
_GEMMA3_PATTERN = 6  # every sixth layer attends to everything
_GEMMA3_WINDOW_THETA = 10000.0
_GEMMA3_27B_LAYERS = 62  # the one size whose scale is not head_dim ** -0.5


def load_gguf(path: Path, name: str | None = None) -> Checkpoint:
    """The checkpoint in `path`, named after the file by default.

    Raises ModelError where the file is damaged, of another family, or contradicts itself.
    """
    file = read_gguf_file(path)
    config = _config(file)
    _check_types(file)
    check_config(config, str(path))
    tensors = {_our_name(name): _lazy_tensor(t, config) for name, t in file.tensors.items() if name != _ROPE_FACTORS}
    check_tensors(config, tensors, str(path))
    source = {"kind": "gguf", "file": path.name, "sha256": sha256(path)}
    return Checkpoint(name or path.stem, config, tensors, read_tokenizer(file), source)


class _Fields:
    """Metadata of one architecture: "embedding_length" is looked up as "llama.embedding_length"."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.prefix = file, architecture

    def get(self, name: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.prefix}.{name}", default)

    def integer(self, name: str, default: int | None = None) -> int:
        """ModelError where it is missing and has no default, or is no whole number."""
        return self._typed(name, default, int, "a whole number")

    def number(self, name: str, default: float | None = None) -> float:
        """A float32 as its shortest decimal: 1e-05 instead of 9.999999747378752e-06."""
        return _shortest(self._typed(name, default, (int, float), "a number"))

    def _typed(self, name: str, default: Any, kind: Any, meaning: str) -> Any:
        value = self.get(name, default)
        if value is None:
            raise ModelError(f"{self.file.path}: metadata {self.prefix}.{name} is missing; convert the model again")
        infinite = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kind) or isinstance(value, bool) or infinite:
            raise ModelError(f"{self.file.path}: metadata {self.prefix}.{name} is {value!r}, but must be {meaning}")
        if isinstance(value, int) and value > most_of(name):
            raise ModelError(
                f"{self.file.path}: metadata {self.prefix}.{name} is {value}, above {most_of(name)}, the most there is"
            )
        return value


def _config(file: GGUFFile) -> ModelConfig:
    family = file.metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ModelError(
            f"{file.path}: architecture {family!r} is not supported; supported families are {', '.join(FAMILIES)}"
        )
    fields = _Fields(file, family)
    hidden, heads, layers = (fields.integer(n) for n in ("embedding_length", "attention.head_count", "block_count"))
    head_dim = fields.integer("attention.key_length", 0) or _head_dim(file, hidden, heads)
    _refuse_unlike_heads(fields, head_dim)
    gemma = family == "gemma3"
    return ModelConfig(
        family=family,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate=fields.integer("feed_forward_length"),
        vocab=_vocabulary(file),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(file, fields, 1e6 if gemma else 1e4),
        max_position=fields.integer("context_length"),
        tied="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm=family in ("qwen3", "gemma3"),
        **(_gemma3_fields(fields, hidden, heads, layers) if gemma else {}),
    )


def _gemma3_fields(fields: _Fields, hidden: int, heads: int, layers: int) -> dict[str, Any]:
    sliding = _sliding_layers(fields, layers)
    return {
        "sandwich_norms": True,
        "activation": "gelu_tanh",
        "attention_scale": (hidden // heads) ** -0.5 if layers == _GEMMA3_27B_LAYERS else None,
        "window": fields.integer("attention.sliding_window"),
        "window_layers": tuple(i for i, slides in enumerate(sliding) if slides),
        "window_rope": Rope(fields.number("rope.freq_base_swa", _GEMMA3_WINDOW_THETA)),
        "embed_scale": hidden**0.5,
    }


def _sliding_layers(fields: _Fields, layers: int) -> list[bool]:
    """For each layer whether it slides; the file says so one by one, or names the period of those that don't."""
    name = "attention.sliding_window_pattern"
    pattern = fields.get(name)
    if isinstance(pattern, np.ndarray):
        sliding = [bool(x) for x in pattern]
    else:
        period = max(fields.integer(name, _GEMMA3_PATTERN), 1)  # 1, like 0: no layer slides
        sliding = [(i + 1) % period != 0 for i in range(layers)]
    if len(sliding) != layers:
        raise ModelError(f"{fields.file.path}: {fields.prefix}.{name} has {len(sliding)} entries for {layers} layers")
    return sliding


def _head_dim(file: GGUFFile, hidden: int, heads: int) -> int:
    if heads < 1 or hidden % heads:
        raise ModelError(f"{file.path}: hidden size {hidden!r} is not a multiple of {heads!r} attention heads")
    return hidden // heads


def _refuse_unlike_heads(fields: _Fields, head_dim: int) -> None:
    for name, meaning in (("attention.value_length", "values"), ("rope.dimension_count", "rotary pairs")):
        found = fields.get(name, head_dim)
        if found != head_dim:
            raise ModelError(
                f"{fields.file.path}: {meaning} of {found} dimensions beside keys of {head_dim} are not supported; "
                "only models with equal ones are"
            )


def _vocabulary(file: GGUFFile) -> int:
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ModelError(f"{file.path}: weight 'token_embd.weight' is missing; the file is incomplete")
    if len(table.shape) != 2:
        dimensions = f"{len(table.shape)} dimensions instead of 2"
        raise ModelError(f"{file.path}: weight 'token_embd.weight' has {dimensions}; the file is damaged")
    return table.shape[0]


def _rope(file: GGUFFile, fields: _Fields, default_theta: float) -> Rope:
    theta = fields.number("rope.freq_base", default_theta)
    if _ROPE_FACTORS in file.tensors:
        factors = _read_float32(file.tensors[_ROPE_FACTORS])
        return Rope(theta, (("type", "factors"), ("factors", tuple(_shortest(x) for x in factors))))
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none":
        return Rope(theta)
    scaling = {"type": kind, "factor": fields.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = fields.get("rope.scaling.original_context_length")
    return Rope(theta, tuple((k, v) for k, v in scaling.items() if v is not None))


def _shortest(value: Any) -> float:
    return float(str(np.float32(value)))


def _our_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.attn.q.weight. An unknown name stays as it is."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block == "blk" and part in _LAYER_NAMES:
        return f"layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"
    return name


def _lazy_tensor(tensor: GGUFTensor, config: ModelConfig) -> LazyTensor:
    rows = _half_order(tensor, config)
    ordered = (lambda array: array) if rows is None else (lambda array: array[rows])
    return LazyTensor(
        shape=tensor.shape,
        format=tensor.type_name,
        read=lambda: ordered(_read_float32(tensor)),
        read_raw=_raw_reader(tensor, ordered),
    )


def _half_order(tensor: GGUFTensor, config: ModelConfig) -> np.ndarray | None:
    """Where each row of q or k (weight or bias) lies in the file; None where rows are in order already."""
    if config.family != "llama" or _part(tensor.name) not in ("attn_q", "attn_k"):
        return None
    pairs = np.arange(tensor.shape[0] // config.head_dim * config.head_dim)
    return pairs.reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _part(name: str) -> str:
    """blk.3.attn_q.weight -> attn_q."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _raw_reader(tensor: GGUFTensor, ordered: Callable[[np.ndarray], np.ndarray]) -> Callable[[], np.ndarray] | None:
    if tensor.type_name in _DENSE:
        return lambda: ordered(tensor.data.view(_DENSE[tensor.type_name]).reshape(tensor.shape))
    if tensor.type_name in BLOCK_FORMATS:
        blocks = tensor.shape[-1] // 32
        return lambda: ordered(tensor.data.reshape(*tensor.shape[:-1], blocks, -1))
    return None


def _read_float32(tensor: GGUFTensor) -> np.ndarray:
    """float32 of the tensor's shape. Its type has been through `_check_types`."""
    if tensor.type_name in _DENSE:
        return tensor.data.view(_DENSE[tensor.type_name]).reshape(tensor.shape).astype(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = tensor.data.reshape(*tensor.shape[:-1], -1)
    return dequantize(rows, GGMLQuantizationType[tensor.type_name.upper()]).astype(np.float32, copy=False)


def _check_types(file: GGUFFile) -> None:
    """Raises ModelError for a tensor type that the gguf package can't dequantise."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for kind, name in {t.type_name: t.name for t in file.tensors.values() if t.type_name not in _DENSE}.items():
        ggml_type = GGMLQuantizationType[kind.upper()]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[ggml_type][1]), np.uint8), ggml_type)
        except NotImplementedError:
            raise ModelError(
                f"{file.path}: weight {name!r} is of type {kind}, which can't be dequantised; "
                "use a file of Q8_0, Q4_0, Q4_1, a K-quant, F16, BF16 or F32"
            ) from None
