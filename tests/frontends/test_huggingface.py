"""Hugging Face directories: every spelling of a configuration, shards, dtypes, tokenizer files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, processors

from tests.checkpoints import FAMILIES, load_reference, make_checkpoint, make_model
from tilewright.compiler.checkpoint import ModelConfig, Rope
from tilewright.compiler.frontends import load_checkpoint
from tilewright.compiler.frontends.huggingface_config import read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 200,
    "vocab_size": 99,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 640,
    "hidden_act": "silu",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 80}


def config(**fields: Any) -> ModelConfig:
    return read_config({**LLAMA, **fields}, "config.json")


def gemma3(**fields: Any) -> ModelConfig:
    return config(architectures=["Gemma3ForCausalLM"], hidden_act=None, head_dim=16, sliding_window=4, **fields)


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    c = config(num_key_value_heads=None)
    assert (c.head_dim, c.kv_heads, c.rope, c.tied, c.activation) == (16, 6, Rope(10000.0), False, "silu")
    assert not (c.attention_bias or c.output_bias or c.mlp_bias or c.qk_norm or c.window_layers)


def test_both_spellings_of_rope() -> None:
    new = config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    old = config(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    assert new == old
    assert new.rope == Rope(5e5, (("type", "llama3"), *sorted(LLAMA3.items())))
    plain = config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert plain == config(rope_theta=5e5) == config(rope_theta=5e5, rope_scaling=None)


def test_both_spellings_of_two_ropes() -> None:
    """The old rope_scaling of gemma3 is for the layers with full attention alone."""
    linear = {"rope_type": "linear", "factor": 8.0}
    new = gemma3(
        rope_parameters={
            "full_attention": {"rope_theta": 1e6, **linear},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        }
    )
    old = gemma3(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear)
    assert new == old
    assert (new.rope, new.window_rope) == (Rope(1e6, (("type", "linear"), ("factor", 8.0))), Rope(1e4))


def test_gemma3_traits() -> None:
    c = gemma3(query_pre_attn_scalar=64, num_hidden_layers=7)
    assert c.window_layers == (0, 1, 2, 3, 4, 6) and c.window == 4
    assert gemma3(sliding_window_pattern=2).window_layers == (0, 2)
    assert (c.attention_scale, c.embed_scale, c.activation) == (0.125, 96**0.5, "gelu_tanh")
    assert c.tied and c.qk_norm and c.sandwich_norms


def test_text_part_of_a_multimodal_model() -> None:
    """Larger gemma3 models nest the configuration and leave fields to transformers' defaults."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
            "model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    c = read_config({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}, "config.json")
    assert (c.heads, c.kv_heads, c.head_dim, c.vocab, c.max_position) == (8, 4, 256, 262208, 131072)
    assert c.rope == Rope(1e6, (("type", "linear"), ("factor", 8.0)))
    assert c.window_layers == tuple(i for i in range(34) if (i + 1) % 6)


def test_windows() -> None:
    assert config(architectures=["MistralForCausalLM"], sliding_window=4).window_layers == (0, 1, 2)
    assert config(architectures=["MistralForCausalLM"], sliding_window=None).window_layers == ()
    qwen: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4}
    assert config(**qwen, use_sliding_window=False).window is None
    assert config(**qwen, use_sliding_window=True, max_window_layers=1).window_layers == (1, 2)
    types = ["full_attention", "sliding_attention", "full_attention"]
    assert config(**qwen, use_sliding_window=True, layer_types=types).window_layers == (1,)


def test_biases() -> None:
    qwen2 = config(architectures=["Qwen2ForCausalLM"])
    assert qwen2.attention_bias and not qwen2.output_bias
    qwen3 = config(architectures=["Qwen3ForCausalLM"], attention_bias=True)
    assert qwen3.attention_bias and qwen3.output_bias and qwen3.head_dim == 128
    llama = config(attention_bias=True, mlp_bias=True)
    assert llama.attention_bias and llama.output_bias and llama.mlp_bias


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    """Dense weights keep their dtype raw, and read as float32."""
    path = make_checkpoint(tmp_path, "qwen2", dtype)
    tensor = load_checkpoint(path).tensors["layers.1.attn.k.bias"]
    assert tensor.format == {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    assert tensor.read_raw is not None and tensor.read_raw().dtype.name == dtype
    expected = load_reference(path).model.layers[1].self_attn.k_proj.bias.detach().numpy()
    assert tensor.read().dtype == np.float32
    np.testing.assert_array_equal(tensor.read(), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gemma3_norms_are_folded(tmp_path: Path, dtype: str) -> None:
    """1 + w in float32, whatever w was stored in: nothing is lost."""
    path = make_checkpoint(tmp_path, "gemma3", dtype)
    checkpoint = load_checkpoint(path)
    layer = load_reference(path).model.layers[2]
    for name, module in (
        ("attn_norm", layer.input_layernorm),
        ("attn_post_norm", layer.post_attention_layernorm),
        ("mlp_norm", layer.pre_feedforward_layernorm),
        ("mlp_post_norm", layer.post_feedforward_layernorm),
        ("attn.q_norm", layer.self_attn.q_norm),
    ):
        tensor = checkpoint.tensors[f"layers.2.{name}.weight"]
        assert tensor.format == "f32"
        np.testing.assert_array_equal(tensor.read(), 1 + module.weight.detach().numpy())


def test_shards(tmp_path: Path) -> None:
    """The files that the index names, and no others."""
    model = make_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    (tmp_path / "many" / "stray.safetensors").write_bytes(b"not looked at")
    one, many = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "many")
    assert set(one.tensors) == set(many.tensors)
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor.read(), many.tensors[name].read())


def test_weights_are_mapped(tmp_path: Path) -> None:
    """A raw weight is a view of the file, not a copy."""
    tensor = load_checkpoint(make_checkpoint(tmp_path, "llama")).tensors["embed.weight"]
    assert tensor.read_raw is not None
    array = tensor.read_raw()
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert isinstance(array, np.memmap)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_weights_of_a_multimodal_model(tmp_path: Path, prefix: str) -> None:
    """The language model is taken out of either spelling; the rest is left alone."""
    path = make_checkpoint(tmp_path, "gemma3")
    plain = load_checkpoint(path)
    weights = load_file(path / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): array for name, array in weights.items()}
    renamed["vision_tower.embeddings.weight"] = np.zeros((2, 2), np.float32)
    renamed["model.multi_modal_projector.weight"] = np.zeros((2, 2), np.float32)
    save_file(renamed, path / "model.safetensors")
    text = json.loads((path / "config.json").read_text())
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (path / "config.json").write_text(json.dumps(nested))
    wrapped = load_checkpoint(path)
    assert wrapped.config == plain.config
    assert set(wrapped.tensors) == set(plain.tensors)


def test_ignored_weights(tmp_path: Path) -> None:
    """A head that repeats the tied table, and buffers that older files hold."""
    path = make_checkpoint(tmp_path, "llama")
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(24, np.float32)
    save_file(weights, path / "model.safetensors")
    assert "lm_head.weight" not in load_checkpoint(path).tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_provenance_follows_the_bytes(tmp_path: Path, family: str) -> None:
    first = load_checkpoint(make_checkpoint(tmp_path / "a", family))
    again = load_checkpoint(make_checkpoint(tmp_path / "b", family))
    other = load_checkpoint(make_checkpoint(tmp_path / "c", family, seed=1))
    assert first.source == again.source != other.source
    assert str(tmp_path) not in str(first.source)


def test_configuration_alone(tmp_path: Path) -> None:
    """Random weights need no weight files."""
    path = make_checkpoint(tmp_path, "qwen3")
    (path / "model.safetensors").unlink()
    checkpoint = load_checkpoint(path, weights=False)
    assert checkpoint.config.family == "qwen3" and not checkpoint.tensors


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def write_tokenizer(path: Path, adds_bos: bool, **files: dict[str, Any]) -> None:
    """tokenizer.json of five tokens, and the JSON files given by name."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<|im_end|>": 3, "?": 4}, unk_token="?"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))


def test_tokenizer_files(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")  # whose config.json says eos_token_id 2
    assert load_checkpoint(path).tokenizer is None
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ messages }}"}
    write_tokenizer(path, True, tokenizer_config=settings, generation_config={"eos_token_id": [4, 2]})
    tokenizer = load_checkpoint(path).tokenizer
    assert tokenizer is not None
    assert Tokenizer.from_str(tokenizer.tokenizer_json).encode("a").ids == [0, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.add_bos) == ("<s>", "</s>", True)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.stop_token_ids == (1, 2, 3, 4)  # eos_token, both files' ids, the known end of turn


def test_beginning_of_sequence(tmp_path: Path) -> None:
    """tokenizer_config.json counts before what the tokenizer does by itself."""
    path = make_checkpoint(tmp_path, "llama")
    for adds_bos, stated, expected in (
        (True, None, True),
        (False, None, False),
        (True, False, False),
        (False, True, True),
    ):
        write_tokenizer(path, adds_bos, tokenizer_config={"bos_token": "<s>", "add_bos_token": stated})
        tokenizer = load_checkpoint(path).tokenizer
        assert tokenizer is not None and tokenizer.add_bos is expected


def test_chat_templates(tmp_path: Path) -> None:
    """A list names several; a file of its own comes first."""
    path = make_checkpoint(tmp_path, "llama")
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    write_tokenizer(path, False, tokenizer_config={"chat_template": named})
    listed = load_checkpoint(path).tokenizer
    (path / "chat_template.jinja").write_text("file")
    own = load_checkpoint(path).tokenizer
    assert listed is not None and own is not None
    assert (listed.chat_template, own.chat_template) == ("d", "file")
