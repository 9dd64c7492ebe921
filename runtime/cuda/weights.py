"""Weights on the GPU: read from the artifact by several threads at a time, or made where they are used."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tilewright.compiler.artifact import PARAMS, Artifact, Param
from tilewright.compiler.errors import ArtifactError
from tilewright.runtime.cuda.cudart import Cudart
from tilewright.runtime.cuda.memory import DeviceMemory, PinnedMemory, aligned, tensor

# Reading the file system's cache, not the bus, is what one thread is too slow for.
_READERS = 8
_CHUNK = 16 << 20  # bytes


class Weights:
    """All weights in one allocation. tensors: in the step's order."""

    def __init__(self, cuda: Cudart, ffi: Any, artifact: Artifact) -> None:
        params = artifact.manifest.params
        self._memory = DeviceMemory(cuda, weights_bytes(params))
        places = dict(zip((p.name for p in params), _places(params), strict=True))
        self.tensors = ffi.Array(
            [tensor(ffi, cuda.device_type, self._memory.address + places[p.name], p.shape, p.dtype) for p in params]
        )
        self.stored = PARAMS in artifact.manifest.files
        if self.stored:
            _upload(cuda, artifact.path / PARAMS, params, {n: self._memory.address + at for n, at in places.items()})


def weights_bytes(params: tuple[Param, ...]) -> int:
    """What they take on the GPU."""
    return sum(aligned(p.bytes) for p in params)


def _places(params: tuple[Param, ...]) -> Iterator[int]:
    at = 0
    for param in params:
        yield at
        at += aligned(param.bytes)


def _upload(cuda: Cudart, file: Path, params: tuple[Param, ...], targets: dict[str, int]) -> None:
    """Copies every tensor of the file to its address."""
    begins = _file_offsets(file)
    pieces = (
        (begins[p.name] + at, targets[p.name] + at, min(_CHUNK, p.bytes - at))
        for p in params
        for at in range(0, p.bytes, _CHUNK)
    )
    shared = _Shared(pieces)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            for reader in [pool.submit(_read, cuda, file, descriptor, shared.next) for _ in range(_READERS)]:
                reader.result()
    finally:
        os.close(descriptor)


def _read(cuda: Cudart, file: Path, descriptor: int, following: Callable[[], tuple[int, int, int] | None]) -> None:
    """One reader: a piece from the file into pinned memory, and on to the GPU while the others read theirs."""
    staging, stream = PinnedMemory(cuda, _CHUNK), cuda.stream()
    while (piece := following()) is not None:
        begin, target, size = piece
        done = 0
        while done < size:
            count = os.preadv(descriptor, [staging.array[done:size].data], begin + done)
            if not count:
                raise ArtifactError(f"{file} is cut short; compile the model again")
            done += count
        cuda.copy(target, staging.address, size, stream)
        cuda.synchronize(stream)
    cuda.drop_stream(stream)


class _Shared:
    """An iterator that several threads take from."""

    def __init__(self, items: Iterator[tuple[int, int, int]]) -> None:
        self._items, self._lock = items, threading.Lock()

    def next(self) -> tuple[int, int, int] | None:
        with self._lock:
            return next(self._items, None)


def _file_offsets(file: Path) -> dict[str, int]:
    """Where each tensor's bytes begin in a safetensors file."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
