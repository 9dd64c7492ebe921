"""Tiny random checkpoints of every family, written by transformers, whose model is the reference for ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

_CONFIGS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}
FAMILIES = tuple(_CONFIGS)

# Small and odd: three query heads on one KV head, a vocabulary that is no multiple of 16.
_COMMON: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {"head_dim": None},  # always hidden_size / heads
    "qwen3": {"tie_word_embeddings": True},
    # Layers 0 and 2 slide, layer 1 does not.
    "gemma3": {
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 40,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Case:
    """A family with overrides of its configuration. `id` names it in test reports."""

    id: str
    family: str
    overrides: tuple[tuple[str, Any], ...] = ()


def _case(id: str, family: str, **overrides: Any) -> Case:
    return Case(id, family, tuple(overrides.items()))


# Between them: head_dim 48 and 80, heads 3, 5 and 8, queries per KV head 1, 3 and 8, tied and untied, biases, windows.
CASES = (
    _case("llama-3to1-tied", "llama"),
    _case("llama-1to1-d80-untied", "llama", head_dim=80, num_attention_heads=5, num_key_value_heads=5,
          hidden_size=80, tie_word_embeddings=False, vocab_size=131),
    _case("llama-8to1-biases", "llama", num_attention_heads=8, attention_bias=True, mlp_bias=True),
    _case("mistral-6to2-window", "mistral", num_attention_heads=6, num_key_value_heads=2),
    _case("qwen2-3to1-untied", "qwen2", hidden_size=144),
    _case("qwen2-8to1-window-tied", "qwen2", num_attention_heads=8, hidden_size=384, use_sliding_window=True,
          sliding_window=4, max_window_layers=1, tie_word_embeddings=True),
    _case("qwen3-3to1-tied", "qwen3"),
    _case("qwen3-8to1-d80-untied", "qwen3", head_dim=80, num_attention_heads=8, tie_word_embeddings=False),
    _case("gemma3-3to1", "gemma3"),
    _case("gemma3-1to1-d80", "gemma3", head_dim=80, num_attention_heads=2, num_key_value_heads=2),
)  # fmt: skip


def make_model(family: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A model of `family` with random float32 weights large enough that every part of it shows in the logits."""
    config_class, model_class = _CONFIGS[family]
    fields = {**_COMMON, **_FAMILY_DEFAULTS[family], **overrides}
    config = config_class(**{k: v for k, v in fields.items() if v is not None}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    centre = 0.0 if family == "gemma3" else 1.0  # gemma3 stores norms as their distance from 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(centre, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


def make_checkpoint(tmp_path: Path, family: str, dtype: str = "float32", **overrides: Any) -> Path:
    """The directory, under `tmp_path`, of a saved `make_model(family, **overrides)` in float32, float16 or bfloat16."""
    path = tmp_path / family
    make_model(family, **overrides).to(getattr(torch, dtype)).save_pretrained(path)
    return path


def make_gguf(tmp_path: Path, family: str, weight_type: str = "F32", seed: int = 0, **overrides: Any) -> Path:
    """The file, under `tmp_path`, of `make_model(family, ...)` as llama.cpp's converter writes it.

    `weight_type` is the ggml type of the matrices ("Q4_1", whose blocks must divide their rows); vectors are F32.
    """
    tmp_path.mkdir(parents=True, exist_ok=True)
    path = tmp_path / f"{family}.gguf"
    writer = gguf_writer(path, family, weight_type, seed, **overrides)
    finish_gguf(writer)
    return path


def gguf_writer(path: Path, family: str, weight_type: str = "F32", seed: int = 0, **overrides: Any) -> gguf.GGUFWriter:
    """A writer that holds configuration and weights, for more metadata; end with `finish_gguf`."""
    model = make_model(family, seed, **overrides)
    writer = gguf.GGUFWriter(path, "llama" if family == "mistral" else family)
    _write_metadata(writer, model.config)
    for name, parameter in model.named_parameters():
        _write_tensor(writer, family, name, parameter.detach().numpy(), model.config, weight_type)
    return writer


def finish_gguf(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, c: Any) -> None:
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_name("Tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(c, "layer_types", None) and c.model_type == "gemma3_text":
        writer.add_sliding_window(c.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in c.layer_types])


def _write_tensor(
    writer: gguf.GGUFWriter, family: str, name: str, array: np.ndarray, config: Any, weight_type: str
) -> None:
    if family == "gemma3" and name.endswith("norm.weight"):
        array = array + np.float32(1)
    if family in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        # Rotary halves -> interleaved pairs, as llama.cpp reads them.
        pairs = array.reshape(-1, 2, config.head_dim // 2, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    stem, suffix = name.rsplit(".", 1)
    architecture = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}["llama" if family == "mistral" else family]
    ours = gguf.get_tensor_name_map(architecture, config.num_hidden_layers).get_name(stem)
    kind = gguf.GGMLQuantizationType[weight_type if array.ndim > 1 else "F32"]
    writer.add_tensor(f"{ours}.{suffix}", gguf.quants.quantize(array, kind), raw_dtype=kind)


def reference_logits(path: Path, tokens: list[int]) -> Any:
    """float32[n, vocab] of the checkpoint in `path` by transformers, in float32."""
    return logits_of(load_reference(path), tokens)


def load_reference(path: Path) -> transformers.PreTrainedModel:
    """The checkpoint in `path` in float32, with attention spelled out."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def load_gguf_reference(path: Path) -> transformers.PreTrainedModel:
    """The GGUF file `path`, dequantised to float32 by transformers. (Its from_pretrained would ask for accelerate.)"""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with _read_once():
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads a whole GGUF file for its configuration and again for its weights, and lists all names of an
    architecture's tensors for each of its modules."""
    with (
        mock.patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


def logits_of(model: transformers.PreTrainedModel, tokens: list[int]) -> Any:
    """float32[n, vocab]."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
