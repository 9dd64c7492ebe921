"""Bad models: each gets one sentence with value, limit and remedy."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints import finish_gguf, gguf_writer, make_checkpoint, make_gguf
from tilewright.compiler.errors import ModelError, UserError
from tilewright.compiler.frontends import load_checkpoint


def message(model: str | Path) -> str:
    """The text of the ModelError that loading raises: one line, without a traceback's marks."""
    with pytest.raises(ModelError) as caught:
        load_checkpoint(model)
    text = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "\n" not in text and "Traceback" not in text and len(text) > 20
    return text


# ---- names and paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2", "smollm2_135m"])
def test_near_names_are_offered(name: str) -> None:
    assert f"unknown model {name!r} (did you mean smollm2-135m" in message(name)


def test_unknown_name() -> None:
    text = message("zzzz")
    assert "unknown model 'zzzz' (known are smollm2-135m, gemma3-270m)" in text
    assert "hub id (org/name)" in text


@pytest.mark.parametrize("name", ["./nowhere/model", "a/b/c", "/nonexistent", "model.gguf", "org/model.gguf"])
def test_missing_path(name: str) -> None:
    assert message(name) == f"{name}: there is no such file or directory; check the path"


def test_empty_directory(tmp_path: Path) -> None:
    assert "the directory is empty; give one with config.json" in message(tmp_path)


def test_directory_without_configuration(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "there is no config.json; give a Hugging Face model directory" in message(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert f"there is no config.json; name the file instead: {tmp_path / 'm.gguf'}" in message(tmp_path)


# ---- config.json -----------------------------------------------------------------------------------------------------


def edited_config(tmp_path: Path, family: str = "llama", **fields: Any) -> str:
    """The message for a checkpoint whose config.json has these fields instead; ... removes one."""
    path = make_checkpoint(tmp_path, family) / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return message(path.parent)


@pytest.mark.parametrize("architectures", [["MambaForCausalLM"], [], None, ...])
def test_unsupported_architecture(tmp_path: Path, architectures: Any) -> None:
    text = edited_config(tmp_path, architectures=architectures)
    name = "'MambaForCausalLM'" if architectures == ["MambaForCausalLM"] else "None"
    assert f"architecture {name} is not supported; supported families are llama (LlamaForCausalLM" in text
    assert text.endswith("qwen2, qwen3, gemma3")


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
     "max_position_embeddings"],
)  # fmt: skip
def test_missing_field(tmp_path: Path, field: str) -> None:
    assert f"config.json: field {field!r} is missing; a llama model needs it" in edited_config(tmp_path, **{field: ...})


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"hidden_size": "96"}, "field 'hidden_size' is '96', but must be a whole number"),
    "true": ({"num_hidden_layers": True}, "field 'num_hidden_layers' is True, but must be a whole number"),
    "zero": ({"num_hidden_layers": 0}, "layers is 0, but must be a whole number above 0"),
    "negative": ({"vocab_size": -1}, "vocab is -1, but must be a whole number above 0"),
    "heads": (
        {"num_attention_heads": 5, "num_key_value_heads": 2},
        "5 attention heads can't be shared among 2 KV heads; one must divide the other",
    ),
    "hidden": ({"head_dim": None, "num_attention_heads": 7}, "96 is not a multiple of num_attention_heads 7"),
    "odd-head": ({"head_dim": 47}, "head_dim is 47, but rotary pairs need an even one"),
    "eps": ({"rms_norm_eps": 0.0}, "norm_eps is 0.0, but must be a number above 0"),
    "activation": ({"hidden_act": "relu"}, "activation 'relu' is not supported; supported are gelu_pytorch_tanh, silu"),
    "theta": ({"rope_parameters": {"rope_theta": -1.0}}, "rope theta is -1.0, but must be a number above 0"),
    "theta-text": ({"rope_parameters": {"rope_theta": "x"}}, "field 'rope_theta' is 'x', but must be a number"),
    "dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope scaling 'dynamic' is not supported; supported are linear, llama3, yarn",
    ),
    "no-factor": (
        {"rope_scaling": {"type": "linear"}, "rope_parameters": ...},
        "rope scaling 'linear' has no 'factor'",
    ),
    "bad-factor": (
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        "'factor' of rope scaling 'linear' is 0, but must be above 0",
    ),
    "rope-text": ({"rope_parameters": "linear"}, "field 'rope_parameters' is 'linear', but must be an object"),
    "partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary pairs for a part of the head only"),
    "soft-cap": ({"final_logit_softcapping": 30.0}, "field 'final_logit_softcapping' is 30.0, which is not supported"),
    "layers": (
        {"num_hidden_layers": 10**100},
        "field 'num_hidden_layers' is 10000000000000000000, above 1000, the most",
    ),
    "vocab": ({"vocab_size": 2**31}, "field 'vocab_size' is 2147483648, above 2147483647, the most there is"),
    "eps-nan": ({"rms_norm_eps": float("nan")}, "field 'rms_norm_eps' is nan, but must be a number"),
    "eps-integer": ({"rms_norm_eps": 10**400}, "field 'rms_norm_eps' is 10000000000000000000, above 2147483647"),
    "tied": ({"tie_word_embeddings": "yes"}, "field 'tie_word_embeddings' is 'yes', but must be true or false"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_contradictions(tmp_path: Path, name: str) -> None:
    fields, expected = BAD_FIELDS[name]
    assert expected in edited_config(tmp_path, **fields)


def test_bad_scale(tmp_path: Path) -> None:
    text = edited_config(tmp_path, "gemma3", query_pre_attn_scalar=0)
    assert "query_pre_attn_scalar is 0.0 and sliding_window_pattern 6; both must be above 0" in text


BAD_WINDOWS: dict[str, tuple[dict[str, Any], str]] = {
    "size": (
        {"sliding_window": 0},
        "layers attend to a sliding window of size 0, but it must be a whole number above 0",
    ),
    "type": (
        {"layer_types": ["linear_attention"] * 3},
        "layer type 'linear_attention' is not supported; full and sliding attention are",
    ),
    "text": ({"layer_types": "full"}, "field 'layer_types' is 'full', but must be a list"),
    "count": ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, but num_hidden_layers is 3"),
}


@pytest.mark.parametrize("name", BAD_WINDOWS)
def test_bad_windows(tmp_path: Path, name: str) -> None:
    fields, expected = BAD_WINDOWS[name]
    assert expected in edited_config(tmp_path, "gemma3", **fields)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_configuration_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = make_checkpoint(tmp_path, "llama")
    (path / "config.json").write_text(text)
    assert "config.json: not " in message(path)


def test_broken_tokenizer(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    (path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a tokenizer that can be read" in message(path)


# ---- safetensors -----------------------------------------------------------------------------------------------------


def edited_weights(tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], Any], **overrides: Any) -> str:
    """The message for a llama checkpoint after `edit` of its weights by name."""
    path = make_checkpoint(tmp_path, "llama", **overrides)
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors")
    return message(path)


def test_missing_weight(tmp_path: Path) -> None:
    text = edited_weights(tmp_path, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    assert "weight 'layers.1.mlp.up.weight' is missing; the file is incomplete" in text


def test_missing_weights(tmp_path: Path) -> None:
    def drop_norms(weights: dict[str, np.ndarray]) -> None:
        for layer in (0, 1):
            del weights[f"model.layers.{layer}.input_layernorm.weight"]

    assert "weight 'layers.0.attn_norm.weight' (and 1 more) are missing" in edited_weights(tmp_path, drop_norms)


def test_missing_head_of_an_untied_model(tmp_path: Path) -> None:
    text = edited_weights(tmp_path, lambda w: w.pop("lm_head.weight"), tie_word_embeddings=False)
    assert "weight 'lm_head.weight' is missing" in text


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight", "x"])
def test_extra_weight(tmp_path: Path, name: str) -> None:
    text = edited_weights(tmp_path, lambda w: w.update({name: np.zeros(4, np.float32)}))
    assert "is not known to a llama model of this configuration" in text


def test_wrong_shape(tmp_path: Path) -> None:
    text = edited_weights(tmp_path, lambda w: w.update({"model.norm.weight": np.zeros(95, np.float32)}))
    assert "weight 'norm.weight' has shape (95,), but the configuration says (96,)" in text


def test_wrong_dtype(tmp_path: Path) -> None:
    text = edited_weights(tmp_path, lambda w: w.update({"model.norm.weight": np.zeros(96, np.int64)}))
    assert "weight 'model.norm.weight' has dtype I64, but must have one of F32, F16, BF16; convert it" in text


@pytest.mark.parametrize("size", [0, 5, 100, -1, -1000])
def test_truncated_safetensors(tmp_path: Path, size: int) -> None:
    """Cut inside the length, the table and the data."""
    file = make_checkpoint(tmp_path, "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    text = message(file.parent)
    assert "download it again" in text and ("not a whole safetensors file" in text or "bytes before weight" in text)


def test_damaged_table(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path, "llama") / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8] = ord("?")
    file.write_bytes(data)
    assert "the table of tensors is not JSON; the file is damaged" in message(file.parent)


def test_table_that_contradicts_the_data(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    table = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [96], "data_offsets": [0, 8]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(table)) + table + bytes(8))
    assert "weight 'model.norm.weight' takes 8 bytes instead of 384; the file is damaged" in message(path)


def test_no_weight_files(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "there are no safetensors files; save the model as safetensors first" in message(path)


def test_missing_shard(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00001.safetensors: the file is missing, but model.safetensors.index.json" in message(path)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" + bytes(100)])
def test_not_gguf(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert "not a GGUF file (it starts with" in message(file)


def test_truncated_gguf_anywhere(tmp_path: Path) -> None:
    """Cut at a hundred places of header, tables and data."""
    whole = make_gguf(tmp_path, "llama").read_bytes()
    file = tmp_path / "cut.gguf"
    rng = np.random.default_rng()
    cuts = [*rng.integers(4, 4000, 70), *rng.integers(4, len(whole), 28), len(whole) - 1, 4]
    for cut in cuts:
        file.write_bytes(whole[:cut])
        text = message(file)
        assert "bytes too early" in text and "download it again" in text, cut


def test_gguf_version(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "GGUF version 1 is not supported (only (2, 3)); convert the model again" in message(file)


def written(tmp_path: Path, edit: Callable[[gguf.GGUFWriter], Any]) -> str:
    """The message for a llama GGUF after `edit` of its writer."""
    writer = gguf_writer(tmp_path / "m.gguf", "llama")
    edit(writer)
    finish_gguf(writer)
    return message(tmp_path / "m.gguf")


def drop(key: str) -> Callable[[gguf.GGUFWriter], Any]:
    return lambda writer: writer.kv_data[0].pop(key)


def test_gguf_architecture(tmp_path: Path) -> None:
    text = written(tmp_path, lambda w: setattr(w.kv_data[0]["general.architecture"], "value", "mamba"))
    assert "architecture 'mamba' is not supported; supported families are llama, qwen2, qwen3, gemma3" in text


def test_gguf_missing_metadata(tmp_path: Path) -> None:
    text = written(tmp_path, drop("llama.embedding_length"))
    assert "metadata llama.embedding_length is missing; convert the model again" in text


def test_gguf_metadata_of_a_wrong_type(tmp_path: Path) -> None:
    def spell_out(writer: gguf.GGUFWriter) -> None:
        drop("llama.block_count")(writer)
        writer.add_string("llama.block_count", "two")

    assert "metadata llama.block_count is 'two', but must be a whole number" in written(tmp_path, spell_out)


def test_gguf_metadata_beyond_any_model(tmp_path: Path) -> None:
    def enlarge(writer: gguf.GGUFWriter) -> None:
        drop("llama.block_count")(writer)
        writer.add_uint32("llama.block_count", 2**32 - 1)

    assert "metadata llama.block_count is 4294967295, above 1000, the most there is" in written(tmp_path, enlarge)


def test_gguf_contradiction(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["llama.attention.head_count_kv"].value = 2

    assert "3 attention heads can't be shared among 2 KV heads" in written(tmp_path, change)


def test_gguf_partial_rotation(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["llama.rope.dimension_count"].value = 24

    assert "rotary pairs of 24 dimensions beside keys of 48 are not supported" in written(tmp_path, change)


def test_gguf_sliding_layers(tmp_path: Path) -> None:
    writer = gguf_writer(tmp_path / "m.gguf", "gemma3")
    writer.kv_data[0]["gemma3.attention.sliding_window_pattern"].value = [True, False]
    finish_gguf(writer)
    text = message(tmp_path / "m.gguf")
    assert "gemma3.attention.sliding_window_pattern has 2 entries for 3 layers" in text


def test_gguf_missing_weight(tmp_path: Path) -> None:
    text = written(tmp_path, lambda w: w.tensors[0].pop("blk.1.attn_v.weight"))
    assert "weight 'layers.1.attn.v.weight' is missing; the file is incomplete" in text


def test_gguf_extra_weight(tmp_path: Path) -> None:
    text = written(tmp_path, lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((4, 96), np.float32)))
    assert "weight 'blk.0.ffn_gate_inp.weight' is not known to a llama model" in text


def test_gguf_wrong_shape(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        del writer.tensors[0]["output_norm.weight"]
        writer.add_tensor("output_norm.weight", np.zeros(95, np.float32))

    assert "weight 'norm.weight' has shape (95,), but the configuration says (96,)" in written(tmp_path, change)


def test_gguf_type_that_nothing_reads(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        del writer.tensors[0]["output_norm.weight"]
        writer.add_tensor("output_norm.weight", np.zeros(96, np.int8))

    assert "weight 'output_norm.weight' is of type i8, which can't be dequantised" in written(tmp_path, change)


BAD_TOKENIZERS: dict[str, tuple[Callable[[gguf.GGUFWriter], Any], str]] = {
    "kind": (lambda w: w.add_tokenizer_model("bert"), "tokenizer 'bert' is not supported; supported are gpt2, llama"),
    "pre": (
        lambda w: (w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("chameleon"), w.add_token_merges([])),
        "pre-tokenizer 'chameleon' is not supported; supported are gpt-2",
    ),
    "no-merges": (lambda w: w.add_tokenizer_model("gpt2"), "metadata tokenizer.ggml.merges is missing"),
    "no-scores": (lambda w: w.add_tokenizer_model("llama"), "metadata tokenizer.ggml.scores is missing"),
    "scores": (
        lambda w: (w.add_tokenizer_model("llama"), w.add_token_scores([1.0])),
        "1 token scores for 2 tokens; convert the model again",
    ),
    "eos": (
        lambda w: (w.add_tokenizer_model("llama"), w.add_token_scores([1.0, 2.0]), w.add_eos_token_id(2)),
        "eos_token_id is 2, but there are 2 tokens",
    ),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_gguf_tokenizers(tmp_path: Path, name: str) -> None:
    edit, expected = BAD_TOKENIZERS[name]
    assert expected in written(tmp_path, lambda w: (w.add_token_list(["a", "b"]), edit(w)))
