"""Qwen2 and 2.5: Llama's layer with biases on q, k and v, which `Layers.linear` adds. Yang et al. 2024."""

from collections.abc import Sequence

from tilewright.models.layers import Layers, Tensor, decoder
from tilewright.models.llama import llama_layer


def qwen2(m: Layers, tokens: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """tokens i32[n] -> (logits f32[n, V], hidden states f32[n, hidden] after each layer)."""
    return decoder(m, tokens, llama_layer)
