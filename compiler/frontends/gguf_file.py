"""The container of GGUF: metadata and a table of tensors, mapped from disk.

Header and tables are little endian: magic, version, counts, key-value pairs, tensor infos, then the aligned data. Every
length is checked against the file's before it is used, so that a truncated or damaged file is told in one sentence.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. (The `gguf` package's own reader makes several numpy
arrays for each token of the vocabulary, which takes seconds; the types and their arithmetic do come from there.)
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.compiler.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """shape: outermost dimension first (rows, K), unlike in the file. data: uint8[bytes], mapped."""

    name: str
    shape: tuple[int, ...]
    type_name: str  # as ggml spells it, lower-case: "f32", "q4_1", "q4_k"
    data: np.ndarray


@dataclass(frozen=True)
class GGUFFile:
    """Metadata values are Python scalars, strings, lists of strings, or numpy arrays of numbers."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_file(path: Path) -> GGUFFile:
    """Maps `path` and reads its tables. ModelError where it is not GGUF, of an unknown version, or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror}); check the path and its permissions") from error
    if magic != MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r}, not {MAGIC!r}); give a .gguf file")
    return _Reader(path, np.memmap(path, np.uint8, mode="r", shape=(size,))).read()


class _Reader:
    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.bytes, self.offset = path, data, data.data, 4

    def read(self) -> GGUFFile:
        version = self._number("<I")
        if version not in VERSIONS:
            raise self._error(f"GGUF version {version} is not supported (only {VERSIONS}); convert the model again")
        tensor_count, pair_count = self._number("<Q"), self._number("<Q")
        metadata = {}
        for _ in range(pair_count):
            key = self._string()
            metadata[key] = self._value(self._number("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._error(f"general.alignment is {alignment!r}; the file is damaged")
        start = -(-self.offset // alignment) * alignment
        return GGUFFile(self.path, metadata, {info[0]: self._tensor(start, *info) for info in infos})

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._array(_SCALARS[kind], 1)[0].item()
        if kind != _ARRAY:
            raise self._error(f"a metadata value has the unknown type {kind}; the file is damaged")
        item, count = self._number("<I"), self._number("<Q")
        if item in _SCALARS:
            return self._array(_SCALARS[item], count)
        if count > len(self.data):  # an item takes a byte at least
            raise self._truncated(count)
        return [self._value(item) for _ in range(count)]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {dimensions} dimensions; the file is damaged")
        shape = tuple(int(x) for x in self._array("<u8", dimensions)[::-1])
        return name, shape, self._number("<I"), self._number("<Q")

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            ggml_type = GGMLQuantizationType(kind)
        except ValueError:
            raise self._error(
                f"tensor {name!r} has the unknown type {kind}; update the gguf package or convert the model again"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        elements = int(np.prod(shape, dtype=object)) if shape else 1
        if shape and shape[-1] % block:
            raise self._error(f"tensor {name!r} has rows of {shape[-1]}, which blocks of {block} don't divide")
        first = start + offset
        last = first + elements // block * block_bytes
        if last > len(self.data):
            raise self._truncated(last - len(self.data))
        return GGUFTensor(name, shape, ggml_type.name.lower(), self.data[first:last])

    def _string(self) -> str:
        length = self._number("<Q")
        raw = self._take(length)
        try:
            return bytes(raw).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"the text at byte {self.offset - length} is not UTF-8; the file is damaged") from None

    def _number(self, code: str) -> int:
        return int(struct.unpack(code, self._take(struct.calcsize(code)))[0])

    def _array(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self._take(np.dtype(dtype).itemsize * count), dtype)

    def _take(self, length: int) -> memoryview:
        end = self.offset + length
        if end > len(self.data):
            raise self._truncated(end - len(self.data))
        part = self.bytes[self.offset : end]
        self.offset = end
        return part

    def _truncated(self, missing: int) -> ModelError:
        return self._error(f"the file ends {missing} bytes too early (it has {len(self.data)}); download it again")

    def _error(self, sentence: str) -> ModelError:
        return ModelError(f"{self.path}: {sentence}")
