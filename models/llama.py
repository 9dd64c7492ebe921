"""Llama and those built like it: SmolLM2, TinyLlama, Llama 2 and 3.x, Mistral. Touvron et al. 2023."""

from collections.abc import Sequence

from tilewright.models.layers import Layers, Rotation, Tensor, decoder


def llama(m: Layers, tokens: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """tokens i32[n] -> (logits f32[n, V], hidden states f32[n, hidden] after each layer)."""
    return decoder(m, tokens, llama_layer)


def llama_layer(m: Layers, x: Tensor, name: str, rotation: Rotation, mask: Tensor) -> Tensor:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    q, k, v = m.heads(m.rms_norm(x, f"{name}.attn_norm"), f"{name}.attn")
    attended = m.attention(m.rotate(q, rotation), m.rotate(k, rotation), v, mask)
    x = m.add(x, m.linear(attended, f"{name}.attn.o"))
    return m.add(x, m.gated_mlp(m.rms_norm(x, f"{name}.mlp_norm"), f"{name}.mlp"))
