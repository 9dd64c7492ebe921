"""Random weights: shaped like the model, the same for the same seed, whatever else is read."""

from pathlib import Path

import numpy as np

from tests.checkpoints import make_checkpoint
from tests.reference import run_model
from tilewright.compiler.frontends import load_checkpoint, random_checkpoint
from tilewright.compiler.parameters import parameter_shapes
from tilewright.models.registry import build_model


def test_shapes_and_scale(tmp_path: Path) -> None:
    config = load_checkpoint(make_checkpoint(tmp_path, "gemma3")).config
    checkpoint = random_checkpoint(config, 7)
    assert {name: t.shape for name, t in checkpoint.tensors.items()} == parameter_shapes(config)
    for name, tensor in checkpoint.tensors.items():
        values = tensor.read()
        assert (values.dtype, values.shape, tensor.format) == (np.float32, tensor.shape, "f32")
        assert tensor.read_raw is not None
        np.testing.assert_array_equal(tensor.read_raw(), values)
        centre, deviation = (1, 0.1) if name.endswith("norm.weight") else (0, 0.02)
        assert abs(values.mean() - centre) < 5 * deviation / values.size**0.5
        assert abs(values.std() - deviation) < 4 * deviation / values.size**0.5


def test_seed_and_name_decide(tmp_path: Path) -> None:
    config = load_checkpoint(make_checkpoint(tmp_path, "llama")).config
    name, other = "layers.0.attn.q.weight", "layers.1.attn.q.weight"
    first, again, reseeded = (random_checkpoint(config, seed).tensors for seed in (1, 1, 2))
    again[other].read()
    np.testing.assert_array_equal(first[name].read(), again[name].read())
    assert not np.array_equal(first[name].read(), first[other].read())
    assert not np.array_equal(first[name].read(), reseeded[name].read())


def test_keeps_the_rest_and_runs(tmp_path: Path) -> None:
    original = load_checkpoint(make_checkpoint(tmp_path, "llama", num_hidden_layers=1), weights=False)
    checkpoint = random_checkpoint(original, 3)
    assert (checkpoint.name, checkpoint.config, checkpoint.tokenizer) == (original.name, original.config, None)
    assert checkpoint.source == {"kind": "random", "seed": "3", "config": "huggingface"}
    logits = run_model(build_model(checkpoint.config), [1, 2, 3], checkpoint)
    assert np.isfinite(logits).all() and logits.std() > 0
