"""Formats bf16_rows, f16_rows: the weight [N, K] as it is, for matrix units that load tiles of rows."""

import ml_dtypes
import numpy as np

from tilewright.models.quant.base import WeightFormat

_DTYPES = {"bf16_rows": np.dtype(ml_dtypes.bfloat16), "f16_rows": np.dtype(np.float16)}


class Rows(WeightFormat):
    block = 1

    def __init__(self, name: str) -> None:
        self.name = name

    def pack_raw(self, raw: np.ndarray) -> np.ndarray:
        """raw: [n, k] in this dtype (bfloat16 also as uint16)."""
        return np.ascontiguousarray(raw.view(_DTYPES[self.name]))

    def quantize(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float32).astype(_DTYPES[self.name])

    def unpack(self, packed: np.ndarray, n: int, k: int) -> np.ndarray:
        return packed.astype(np.float32)
