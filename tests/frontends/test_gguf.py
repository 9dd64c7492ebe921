"""GGUF files as checkpoints: the same weights and configuration as the Hugging Face directory they were made from."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.checkpoints import finish_gguf, gguf_writer, load_gguf_reference, logits_of, make_checkpoint, make_gguf
from tests.reference import run_model
from tests.tolerances import assert_close
from tilewright.compiler.checkpoint import Checkpoint, Rope
from tilewright.compiler.frontends import load_checkpoint
from tilewright.compiler.frontends.gguf_file import read_gguf_file
from tilewright.models.registry import build_model

PAIRS = {
    "llama": {},
    "llama-grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "gemma3": {},
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_directory(tmp_path: Path, name: str) -> None:
    """Names, row order, the folded 1 + w, and every field of the configuration."""
    family, overrides = name.partition("-")[0], PAIRS[name]
    if family == "gemma3":  # GGUF has no field for another scale
        overrides = {"query_pre_attn_scalar": 48}
    theirs = load_checkpoint(make_checkpoint(tmp_path, family, **overrides))
    ours = load_checkpoint(make_gguf(tmp_path, family, **overrides))
    assert _with_scale(ours) == _with_scale(theirs)
    assert set(ours.tensors) == set(theirs.tensors)
    for key, tensor in theirs.tensors.items():
        assert_close(ours.tensors[key].read(), tensor.read(), "float32")
    assert ours.name == family
    assert ours.source["kind"] == "gguf" and len(ours.source["sha256"]) == 64


def _with_scale(checkpoint: Checkpoint) -> dict[str, Any]:
    fields = dict(vars(checkpoint.config))
    scale = fields["attention_scale"] or checkpoint.config.head_dim**-0.5
    return {**fields, "attention_scale": pytest.approx(scale), "embed_scale": pytest.approx(fields["embed_scale"])}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_stay_packed_and_rows_move_whole(tmp_path: Path, kind: str) -> None:
    """Un-permuting the rows of packed blocks is un-permuting the rows of what they hold."""
    overrides = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    dense = load_checkpoint(make_gguf(tmp_path / "dense", "llama", **overrides))
    packed = load_checkpoint(make_gguf(tmp_path, "llama", kind, **overrides))
    quantiser = gguf.GGMLQuantizationType[kind]
    for part in ("q", "k", "v", "o"):
        tensor = packed.tensors[f"layers.1.attn.{part}.weight"]
        assert tensor.format == kind.lower()
        assert tensor.read_raw is not None
        raw = tensor.read_raw()
        expected = gguf.quants.quantize(dense.tensors[f"layers.1.attn.{part}.weight"].read(), quantiser)
        assert raw.dtype == np.uint8 and raw.shape == (*raw.shape[:2], expected.shape[1] // raw.shape[1])
        assert raw.shape[1] == tensor.shape[1] // 32
        np.testing.assert_array_equal(raw.reshape(expected.shape), expected)
        np.testing.assert_array_equal(tensor.read(), gguf.quants.dequantize(expected, quantiser))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_dense_types_keep_their_bits(tmp_path: Path, kind: str) -> None:
    dense = load_checkpoint(make_gguf(tmp_path / "dense", "qwen3"))
    half = load_checkpoint(make_gguf(tmp_path, "qwen3", kind))
    tensor = half.tensors["layers.0.mlp.up.weight"]
    assert tensor.format == kind.lower()
    assert tensor.read_raw is not None
    raw = tensor.read_raw()
    assert raw.dtype.name == {"F16": "float16", "BF16": "bfloat16"}[kind]
    np.testing.assert_array_equal(raw.astype(np.float32), tensor.read())
    tolerance = {"F16": "float16", "BF16": "bfloat16"}[kind]
    assert_close(tensor.read(), dense.tensors["layers.0.mlp.up.weight"].read(), tolerance)


def test_other_types_are_dequantised(tmp_path: Path) -> None:
    path = make_gguf(tmp_path, "llama", "Q5_1", head_dim=64)
    checkpoint = load_checkpoint(path)
    tensor = checkpoint.tensors["layers.0.mlp.down.weight"]
    assert (tensor.format, tensor.read_raw) == ("q5_1", None)
    assert_close(run_model(build_model(checkpoint.config), [5, 3, 8], checkpoint),
                 logits_of(load_gguf_reference(path), [5, 3, 8]), "logits_float32")  # fmt: skip


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_k_quants_can_be_read(tmp_path: Path, kind: str) -> None:
    """Types that the gguf package reads but can't write: random blocks."""
    ggml_type = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    blocks = np.random.default_rng().integers(0, 0x30, (203, block_bytes), np.uint8)
    path = _replace_tensor(tmp_path, "token_embd.weight", blocks, ggml_type, hidden_size=block, num_attention_heads=2)
    tensor = load_checkpoint(path).tensors["embed.weight"]
    assert tensor.format == kind.lower()
    np.testing.assert_array_equal(tensor.read(), gguf.quants.dequantize(blocks, ggml_type))


def _replace_tensor(folder: Path, name: str, data: np.ndarray, kind: Any, **overrides: Any) -> Path:
    path = folder / "replaced.gguf"
    writer = gguf_writer(path, "llama", num_hidden_layers=1, **overrides)
    for tensors in writer.tensors:
        del tensors[name]
    writer.add_tensor(name, data, raw_dtype=kind)
    finish_gguf(writer)
    return path


def test_rope_factors_and_scaling(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 24).astype(np.float32)
    writer = gguf_writer(tmp_path / "factors.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", factors)
    finish_gguf(writer)
    scaling = dict(load_checkpoint(tmp_path / "factors.gguf").config.rope.scaling)
    assert scaling["type"] == "factors"
    np.testing.assert_array_equal(np.array(scaling["factors"], np.float32), factors)

    writer = gguf_writer(tmp_path / "linear.gguf", "gemma3")
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    finish_gguf(writer)
    config = load_checkpoint(tmp_path / "linear.gguf").config
    assert config.rope == Rope(1e6, (("type", "linear"), ("factor", 8.0)))
    assert config.window_rope == Rope(1e4)


def test_container_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    """Our reader against gguf.GGUFReader on every tensor and metadata value."""
    writer = gguf_writer(tmp_path / "m.gguf", "gemma3", "Q4_0", head_dim=64)
    writer.add_token_list(["a", "bé", "中"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_bool("some.flag", True)
    writer.add_float64("some.double", 0.1)
    finish_gguf(writer)
    ours, theirs = read_gguf_file(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for key, value in fields.items():
        mine = ours.metadata[key]
        assert (mine.tolist() if isinstance(mine, np.ndarray) else mine) == value, key
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.type_name == tensor.tensor_type.name.lower()
        assert mine.shape == tuple(int(x) for x in tensor.shape[::-1])
        np.testing.assert_array_equal(mine.data, tensor.data.view(np.uint8).reshape(-1))
