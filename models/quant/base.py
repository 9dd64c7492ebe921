"""What a weight format is: how a weight of N outputs by K inputs lies in memory for the kernels.

Rows stand in panels of 16, one row a lane, so that one vector load serves 16 outputs; the rows beyond N are zeros.
With P = ceil(N / 16) and blocks of B inputs, a format of panels is [P, K / B, ...]: a kernel walks a panel from front
to back in increasing K. compiler/packed_weights.py has the shapes and what is inside.
"""

from abc import ABC, abstractmethod

import numpy as np

from tilewright.compiler.errors import CompileError
from tilewright.compiler.packed_weights import BLOCK, PANEL, packed_dtype, packed_shape


class WeightFormat(ABC):
    """One layout. `name` is what specs say; `block` the inputs a scale covers (1: dense); arrays are C-contiguous."""

    name: str
    block: int

    @property
    def packed_dtype(self) -> str:
        return packed_dtype(self.name)

    def packed_shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of a packed [n, k] weight. Raises CompileError if k does not suit the format."""
        return packed_shape(self.name, n, k)

    @abstractmethod
    def pack_raw(self, raw: np.ndarray) -> np.ndarray:
        """Pack what a model file holds: uint8[n, k / 32, bytes of a block], or a dense [n, k] array."""

    @abstractmethod
    def quantize(self, values: np.ndarray) -> np.ndarray:
        """float32[n, k] -> the raw form that `pack_raw` takes, rounded to this format."""

    @abstractmethod
    def unpack(self, packed: np.ndarray, n: int, k: int) -> np.ndarray:
        """The exact float32[n, k] values of a packed weight."""

    def pack(self, values: np.ndarray) -> np.ndarray:
        """float32[n, k] -> packed."""
        return self.pack_raw(self.quantize(values))

    def packed_bytes(self, n: int, k: int) -> int:
        return int(np.prod(self.packed_shape(n, k), dtype=np.int64)) * np.dtype(self.packed_dtype).itemsize


def panels(n: int) -> int:
    """How many panels n rows fill."""
    return -(-n // PANEL)


def pad_rows(array: np.ndarray) -> np.ndarray:
    """[n, ...] -> [P, 16, ...], with zeros after row n."""
    count = panels(len(array))
    if extra := count * PANEL - len(array):
        array = np.concatenate([array, np.zeros((extra, *array.shape[1:]), array.dtype)])
    return array.reshape(count, PANEL, *array.shape[1:])


def to_vectors(values: np.ndarray) -> np.ndarray:
    """[n, KB, 32] -> [P, KB, 8, 64]: byte 4 * row + i of vector j is element 4 * j + i of the block."""
    tiles = pad_rows(values)
    count, _, blocks, _ = tiles.shape
    grouped = tiles.reshape(count, PANEL, blocks, 8, 4).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(grouped).reshape(count, blocks, 8, 64)


def from_vectors(vectors: np.ndarray, n: int) -> np.ndarray:
    """The inverse of `to_vectors`."""
    count, blocks, _, _ = vectors.shape
    grouped = vectors.reshape(count, blocks, 8, PANEL, 4).transpose(0, 3, 1, 2, 4)
    return grouped.reshape(count * PANEL, blocks, BLOCK)[:n]


def nibbles_of(raw: np.ndarray) -> np.ndarray:
    """uint8[..., 16] of a GGUF block -> [..., 32]: the low nibbles are the first 16 inputs, the high ones the rest."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """uint8[n, KB, 32] below 16 -> [P, KB, 256]: vectors 0..3 in the low nibbles, 4..7 in the high ones."""
    vectors = to_vectors(values)
    joined = vectors[:, :, :4] | (vectors[:, :, 4:] << 4)
    return joined.reshape(*joined.shape[:2], 256)


def unpack_nibbles(packed: np.ndarray, n: int) -> np.ndarray:
    """The inverse of `pack_nibbles`."""
    vectors = packed.reshape(*packed.shape[:2], 4, 64)
    return from_vectors(np.concatenate([vectors & 15, vectors >> 4], axis=2), n)


def pack_halves(values: np.ndarray) -> np.ndarray:
    """float16[n, KB] -> uint8[P, KB, 32]: one number a row."""
    tiles = pad_rows(values.astype(np.float16)).transpose(0, 2, 1)
    return np.ascontiguousarray(tiles).view(np.uint8)


def unpack_halves(packed: np.ndarray, n: int) -> np.ndarray:
    """The inverse of `pack_halves`, as float32[n, KB]."""
    tiles = np.ascontiguousarray(packed).view(np.float16).transpose(0, 2, 1)
    return tiles.reshape(-1, packed.shape[1])[:n].astype(np.float32)


def blocks_of(values: np.ndarray, name: str) -> np.ndarray:
    """float[n, k] -> float32[n, KB, 32]. Raises CompileError if k is no multiple of 32."""
    n, k = values.shape
    _, blocks, _ = packed_shape(name, n, k)
    return np.asarray(values, np.float32).reshape(n, blocks, BLOCK)


def half_bytes(values: np.ndarray) -> np.ndarray:
    """float[...] -> uint8[..., 2], as float16. Raises CompileError if a value overflows float16."""
    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(values, np.float32).astype(np.float16)
    if not np.isfinite(halves).all():
        raise CompileError("a block's scale or minimum is beyond float16 (65504): keep this weight in f32")
    return halves[..., None].view(np.uint8)
