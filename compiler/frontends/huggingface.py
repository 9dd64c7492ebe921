"""A directory of config.json and safetensors as a checkpoint."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.compiler.artifact import sha256
from tilewright.compiler.checkpoint import Checkpoint, LazyTensor, ModelConfig
from tilewright.compiler.errors import ModelError
from tilewright.compiler.frontends.huggingface_config import read_config
from tilewright.compiler.frontends.huggingface_tokenizer import read_json, read_tokenizer
from tilewright.compiler.frontends.safetensors_file import FORMATS, SafeTensor, read_safetensors_file
from tilewright.compiler.parameters import check_config, check_tensors

_INDEX = "model.safetensors.index.json"
_TOP_NAMES = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "lm_head"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_SANDWICH_NAMES = {
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
# Parts of a multimodal model beside its language model, and buffers that follow from the configuration.
_IGNORED_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def load_huggingface(directory: Path, name: str | None = None, weights: bool = True) -> Checkpoint:
    """The checkpoint in `directory`; without `weights` only configuration and tokenizer, and `tensors` is empty.

    ModelError where a file is missing or damaged, the architecture is of no supported family, or the weights are not
    those of the configuration.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(_no_config(directory))
    raw = read_json(path)
    config = read_config(raw, str(path))
    check_config(config, str(path))
    tensors: dict[str, LazyTensor] = {}
    source = {"kind": "huggingface", "file": directory.name}
    if weights:
        files = _weight_files(directory)
        tensors = _tensors(files, config)
        check_tensors(config, tensors, str(directory))
        digest = hashlib.sha256("".join(sha256(file) for file in (path, *files)).encode())
        source["sha256"] = digest.hexdigest()
    return Checkpoint(name or directory.resolve().name, config, tensors, read_tokenizer(directory, raw), source)


def _no_config(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    if not names:
        return f"{directory}: the directory is empty; give one with config.json and safetensors files"
    gguf = [n for n in names if n.endswith(".gguf")]
    remedy = f"name the file instead: {directory / gguf[0]}" if gguf else "give a Hugging Face model directory"
    return f"{directory}: there is no config.json; {remedy}"


def _weight_files(directory: Path) -> list[Path]:
    """The files that the index names, else all safetensors files."""
    index = read_json(directory / _INDEX)
    if index:
        files = [directory / name for name in sorted(set(index.get("weight_map", {}).values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{missing[0]}: the file is missing, but {_INDEX} names it; download it")
    if not files:
        raise ModelError(f"{directory}: there are no safetensors files; save the model as safetensors first")
    return files


def _tensors(files: list[Path], config: ModelConfig) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        for name, tensor in read_safetensors_file(file).items():
            ours = _our_name(name, config)
            if ours is not None:
                tensors[ours] = _lazy_tensor(file, name, tensor, config)
    return tensors


def _our_name(name: str, config: ModelConfig) -> str | None:
    """model.layers.3.self_attn.q_proj.weight -> layers.3.attn.q.weight; None for what is not needed.

    An unknown name stays as it is and is refused later. A multimodal model's prefix is dropped: language_model.model.
    (written by transformers 4) or model.language_model. (written by transformers 5).
    """
    if name.startswith(_IGNORED_PREFIXES) or name.endswith(_IGNORED_SUFFIXES):
        return None
    plain = name.removeprefix("language_model.")
    if plain.startswith("model.language_model."):
        plain = "model." + plain.removeprefix("model.language_model.")
    stem, _, suffix = plain.rpartition(".")
    if stem == "lm_head" and config.tied:
        return None
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    layer_names = _LAYER_NAMES | (_SANDWICH_NAMES if config.sandwich_norms else {})
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    if stem.startswith("model.layers.") and part in layer_names:
        return f"layers.{layer}.{layer_names[part]}.{suffix}"
    return name


def _lazy_tensor(file: Path, name: str, tensor: SafeTensor, config: ModelConfig) -> LazyTensor:
    if tensor.dtype not in FORMATS:
        raise ModelError(
            f"{file}: weight {name!r} has dtype {tensor.dtype}, but must have one of {', '.join(FORMATS)}; convert it"
        )
    if config.family == "gemma3" and name.endswith("norm.weight"):
        return _one_plus(tensor)
    return LazyTensor(
        shape=tensor.shape,
        format=FORMATS[tensor.dtype],
        read=lambda: tensor.array().astype(np.float32),
        read_raw=tensor.array,
    )


def _one_plus(tensor: SafeTensor) -> LazyTensor:
    """A norm that is stored as its distance from 1."""

    def read() -> Any:
        return np.float32(1) + tensor.array().astype(np.float32)

    return LazyTensor(shape=tensor.shape, format="f32", read=read, read_raw=read)
