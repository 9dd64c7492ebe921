"""q4_0: w = (q - 8) d, 4 bits and a float16 scale a block of 32. Packed as uint8[P, KB, 288]: nibbles, then scales.

A raw block is 18 bytes: float16 d, 16 bytes of nibbles (ggml's layout).
"""

import numpy as np

from tilewright.models.quant import base


class Q4_0(base.WeightFormat):
    name = "q4_0"
    block = base.BLOCK

    def pack_raw(self, raw: np.ndarray) -> np.ndarray:
        scales = np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0]
        return np.concatenate([base.pack_nibbles(base.nibbles_of(raw[..., 2:])), base.pack_halves(scales)], axis=-1)

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """The value farthest from zero becomes -8 d."""
        blocks = base.blocks_of(values, self.name)
        farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
        d = farthest / np.float32(-8)
        inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
        q = np.minimum((blocks * inverse + np.float32(8.5)).astype(np.uint8), 15)
        return np.concatenate([base.half_bytes(d[..., 0]), q[..., :16] | (q[..., 16:] << 4)], axis=-1)

    def unpack(self, packed: np.ndarray, n: int, k: int) -> np.ndarray:
        q = base.unpack_nibbles(packed[..., :256], n).astype(np.float32)
        return ((q - 8) * base.unpack_halves(packed[..., 256:], n)[..., None]).reshape(n, k)
