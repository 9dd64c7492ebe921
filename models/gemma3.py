"""Gemma 3, the text part: sliding-window layers with a rope of their own between full ones, normalised heads, scaled
embeddings, and norms on both sides of attention and MLP. Gemma Team 2025."""

from collections.abc import Sequence

from tilewright.models.layers import Layers, Rotation, Tensor, decoder


def gemma3(m: Layers, tokens: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """tokens i32[n] -> (logits f32[n, V], hidden states f32[n, hidden] after each layer)."""
    return decoder(m, tokens, gemma3_layer)


def gemma3_layer(m: Layers, x: Tensor, name: str, rotation: Rotation, mask: Tensor) -> Tensor:
    """x + norm(attention(norm(x))) with normalised heads, then x + norm(mlp(norm(x)))."""
    q, k, v = m.heads(m.rms_norm(x, f"{name}.attn_norm"), f"{name}.attn")
    q, k = m.rms_norm(q, f"{name}.attn.q_norm"), m.rms_norm(k, f"{name}.attn.k_norm")
    attended = m.linear(m.attention(m.rotate(q, rotation), m.rotate(k, rotation), v, mask), f"{name}.attn.o")
    x = m.add(x, m.rms_norm(attended, f"{name}.attn_post_norm"))
    mixed = m.gated_mlp(m.rms_norm(x, f"{name}.mlp_norm"), f"{name}.mlp")
    return m.add(x, m.rms_norm(mixed, f"{name}.mlp_post_norm"))
