"""Rope frequencies against transformers', with every scaling, at head sizes of all families."""

from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.tolerances import assert_close
from tilewright.compiler.checkpoint import Rope
from tilewright.models.layers import rope_frequencies

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn-mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 48,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "yarn-stated-factor": {"factor": 2.0, "original_max_position_embeddings": 512, "attention_factor": 1.25},
    "yarn-not-truncated": {"factor": 4.0, "original_max_position_embeddings": 4096, "truncate": False},
}


@pytest.mark.parametrize("head_dim", [48, 80, 128])
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_scaled_frequencies(name: str, head_dim: int, theta: float) -> None:
    kind, numbers = name.partition("-")[0], SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=4096 * 4,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **numbers},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    scaling = (("type", kind), *sorted(numbers.items()))
    frequencies, factor = rope_frequencies(Rope(theta, scaling), head_dim)
    assert frequencies.dtype == np.float32
    # Each frequency on its own: small ones must be as exact as large ones.
    assert_close(frequencies / expected.numpy(), np.ones(head_dim // 2))
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_plain_frequencies() -> None:
    frequencies, factor = rope_frequencies(Rope(10000.0), 80)
    expected = 10000.0 ** (-np.arange(0, 80, 2) / 80)
    assert_close(frequencies / expected, np.ones(40))
    assert factor == 1.0


def test_factors_divide_each_frequency() -> None:
    factors = tuple(np.random.default_rng().uniform(1, 8, 24).tolist())
    plain, _ = rope_frequencies(Rope(500.0), 48)
    divided, factor = rope_frequencies(Rope(500.0, (("type", "factors"), ("factors", factors))), 48)
    assert_close(divided * factors, plain)
    assert factor == 1.0
