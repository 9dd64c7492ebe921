"""Tensors of safetensors files, mapped from disk: a JSON table behind its length, then the data.

Written here rather than taken from the library because numpy has no bfloat16 and because each way in which a file can
be damaged deserves its own sentence. Layout: https://huggingface.co/docs/safetensors.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from tilewright.compiler.errors import ModelError

_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class SafeTensor:
    """data: uint8[bytes], mapped. dtype: as safetensors spells it ("BF16")."""

    shape: tuple[int, ...]
    dtype: str
    data: np.ndarray

    def array(self) -> np.ndarray:
        """The tensor in its own dtype, still mapped. The dtype must be one of `FORMATS`."""
        return self.data.view(_DTYPES[self.dtype]).reshape(self.shape)


def read_safetensors_file(path: Path) -> dict[str, SafeTensor]:
    """Every tensor of `path` by name. ModelError where the file is cut short or damaged."""
    try:
        size = path.stat().st_size
        header, start = _header(path, size)
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror}); check the path and its permissions") from error
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, mode="r", shape=(size,))
    return {name: _tensor(path, name, entry, data[start:]) for name, entry in header.items()}


def _header(path: Path, size: int) -> tuple[dict, int]:
    """The table, and where the data starts."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length < 2 or 8 + length > size:
            raise ModelError(f"{path}: not a whole safetensors file (it has {size} bytes); download it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path}: the table of tensors is not JSON; the file is damaged") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the table of tensors is not a JSON object; the file is damaged")
    return header, 8 + length


def _tensor(path: Path, name: str, entry: dict, data: np.ndarray) -> SafeTensor:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ModelError(f"{path}: the entry of weight {name!r} is incomplete; the file is damaged") from None
    if last > len(data):
        raise ModelError(
            f"{path}: the file ends {last - len(data)} bytes before weight {name!r} does; download it again"
        )
    expected = _DTYPES[dtype].itemsize * int(np.prod(shape, dtype=object)) if dtype in _DTYPES else last - first
    if last - first != expected:
        raise ModelError(
            f"{path}: weight {name!r} takes {last - first} bytes instead of {expected}; the file is damaged"
        )
    return SafeTensor(shape, dtype, data[first:last])
