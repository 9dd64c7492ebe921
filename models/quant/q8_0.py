"""q8_0: w = q d, int8 and a float16 scale a block of 32.

Packed as uint8[P, KB, 544]: 8 vectors of 64 int8, then scales.
A raw block is 34 bytes: float16 d, 32 int8 (ggml's layout).
"""

import numpy as np

from tilewright.models.quant import base


class Q8_0(base.WeightFormat):
    name = "q8_0"
    block = base.BLOCK

    def pack_raw(self, raw: np.ndarray) -> np.ndarray:
        scales = np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0]
        vectors = base.to_vectors(raw[..., 2:])
        return np.concatenate([vectors.reshape(*vectors.shape[:2], 512), base.pack_halves(scales)], axis=-1)

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """The greatest magnitude becomes 127."""
        blocks = base.blocks_of(values, self.name)
        d = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
        q = np.rint(blocks * inverse).astype(np.int8)
        return np.concatenate([base.half_bytes(d[..., 0]), q.view(np.uint8)], axis=-1)

    def unpack(self, packed: np.ndarray, n: int, k: int) -> np.ndarray:
        count, blocks, _ = packed.shape
        q = base.from_vectors(packed[..., :512].reshape(count, blocks, 8, 64), n).view(np.int8).astype(np.float32)
        return (q * base.unpack_halves(packed[..., 512:], n)[..., None]).reshape(n, k)
