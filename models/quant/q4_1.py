"""q4_1: w = q d + m, 4 bits, a float16 scale and minimum a block of 32.

Packed as uint8[P, KB, 320]: nibbles, scales, minima.
A raw block is 20 bytes: float16 d, float16 m, 16 bytes of nibbles (ggml's layout).
"""

import numpy as np

from tilewright.models.quant import base


class Q4_1(base.WeightFormat):
    name = "q4_1"
    block = base.BLOCK

    def pack_raw(self, raw: np.ndarray) -> np.ndarray:
        halves = np.ascontiguousarray(raw[..., :4]).view(np.float16)
        nibbles = base.pack_nibbles(base.nibbles_of(raw[..., 4:]))
        return np.concatenate([nibbles, base.pack_halves(halves[..., 0]), base.pack_halves(halves[..., 1])], axis=-1)

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """The least value becomes 0, the greatest 15."""
        blocks = base.blocks_of(values, self.name)
        low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        d = (high - low) / np.float32(15)
        inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
        q = np.minimum(((blocks - low) * inverse + np.float32(0.5)).astype(np.uint8), 15)
        halves = [base.half_bytes(d[..., 0]), base.half_bytes(low[..., 0])]
        return np.concatenate([*halves, q[..., :16] | (q[..., 16:] << 4)], axis=-1)

    def unpack(self, packed: np.ndarray, n: int, k: int) -> np.ndarray:
        q = base.unpack_nibbles(packed[..., :256], n).astype(np.float32)
        d, m = (base.unpack_halves(packed[..., start : start + 32], n)[..., None] for start in (256, 288))
        return (q * d + m).reshape(n, k)
