"""Qwen3: q and k are normalised in every head before they are rotated. Yang et al. 2025."""

from collections.abc import Sequence

from tilewright.models.layers import Layers, Rotation, Tensor, decoder


def qwen3(m: Layers, tokens: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """tokens i32[n] -> (logits f32[n, V], hidden states f32[n, hidden] after each layer)."""
    return decoder(m, tokens, qwen3_layer)


def qwen3_layer(m: Layers, x: Tensor, name: str, rotation: Rotation, mask: Tensor) -> Tensor:
    """x + attention(norm(x)) with normalised heads, then x + mlp(norm(x))."""
    q, k, v = m.heads(m.rms_norm(x, f"{name}.attn_norm"), f"{name}.attn")
    q, k = m.rms_norm(q, f"{name}.attn.q_norm"), m.rms_norm(k, f"{name}.attn.k_norm")
    attended = m.attention(m.rotate(q, rotation), m.rotate(k, rotation), v, mask)
    x = m.add(x, m.linear(attended, f"{name}.attn.o"))
    return m.add(x, m.gated_mlp(m.rms_norm(x, f"{name}.mlp_norm"), f"{name}.mlp"))
