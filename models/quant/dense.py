"""Dense formats f32, f16, bf16: [P, K, 16], one row a lane. bfloat16 travels as its bits, uint16."""

import ml_dtypes
import numpy as np

from tilewright.models.quant.base import WeightFormat, pad_rows

_DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


class Dense(WeightFormat):
    block = 1

    def __init__(self, name: str) -> None:
        self.name = name

    def pack_raw(self, raw: np.ndarray) -> np.ndarray:
        """raw: [n, k] in this dtype (bfloat16 also as uint16)."""
        expected = _DTYPES[self.name]
        if raw.dtype != expected and raw.dtype != np.dtype(self.packed_dtype):
            raise ValueError(f"a raw {self.name} weight has dtype {raw.dtype}")
        return np.ascontiguousarray(pad_rows(raw.view(self.packed_dtype)).transpose(0, 2, 1))

    def quantize(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float32).astype(_DTYPES[self.name])

    def unpack(self, packed: np.ndarray, n: int, k: int) -> np.ndarray:
        rows = packed.transpose(0, 2, 1).reshape(-1, k)[:n]
        return np.ascontiguousarray(rows).view(_DTYPES[self.name]).astype(np.float32)
