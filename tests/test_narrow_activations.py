"""Which weights' products take 8-bit activations on a CPU."""

import pytest

from tilewright.compiler.build import narrow_activations
from tilewright.compiler.checkpoint import ModelConfig, Rope

PARTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


def narrow(layers: int, weight_format: str) -> set[str]:
    config = ModelConfig("llama", 64, layers, 2, 1, 32, 128, 256, 1e-5, Rope(10000.0), 512)
    names = [f"layers.{i}.{part}.weight" for i in range(layers) for part in PARTS]
    return set(narrow_activations(config, dict.fromkeys([*names, "embed.weight"], weight_format)))


@pytest.mark.parametrize("weight_format", ["q4_0", "q4_1"])
def test_beside_4_bit_weights_all_but_what_feeds_attention_and_the_last_layers(weight_format: str) -> None:
    expected = {f"layers.0.{part}.weight" for part in ("attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    assert narrow(3, weight_format) == expected


def test_beside_8_bit_weights_what_the_gate_damps() -> None:
    assert narrow(3, "q8_0") == {"layers.0.mlp.gate.weight", "layers.0.mlp.up.weight"}


def test_none_of_a_short_model_and_none_beside_dense_weights() -> None:
    assert not narrow(2, "q4_1") and not narrow(5, "bf16")
