"""The KV pages on the GPU, and the host's memory for those of preempted sequences."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from tilewright.compiler.artifact import Manifest
from tilewright.runtime.cuda.cudart import Cudart
from tilewright.runtime.cuda.memory import DeviceMemory, PinnedMemory, tensor, tensor_bytes
from tilewright.runtime.sizes import pages_shape

_SLAB_BYTES = 64 << 20  # pinned memory is taken in such pieces, when it is needed


class Pages:
    """pages[layer, page, ...] on the GPU. A page is `rows` pieces of `piece` bytes, one a layer, a pitch apart."""

    def __init__(self, cuda: Cudart, ffi: Any, manifest: Manifest, count: int) -> None:
        self._cuda = cuda
        shape, dtype = pages_shape(manifest, count), manifest.kv["dtype"]
        self.count, self.layers = count, shape[0]
        self.piece = tensor_bytes(shape[2:], dtype)
        self.pitch = count * self.piece
        self._memory = DeviceMemory(cuda, prod((self.layers, self.pitch)))
        self.tensor = tensor(ffi, cuda.device_type, self._memory.address, shape, dtype)

    def copy(self, source: int, target: int, stream: int) -> None:
        self._move(self._address(target), self.pitch, self._address(source), self.pitch, stream)

    def save(self, page: int, target: int, stream: int) -> None:
        """A page into layers * piece bytes at `target`."""
        self._move(target, self.piece, self._address(page), self.pitch, stream)

    def restore(self, source: int, page: int, stream: int) -> None:
        self._move(self._address(page), self.pitch, source, self.piece, stream)

    def _address(self, page: int) -> int:
        return self._memory.address + page * self.piece

    def _move(self, target: int, target_pitch: int, source: int, source_pitch: int, stream: int) -> None:
        if self.pitch <= self._cuda.max_pitch:
            self._cuda.copy_2d(target, target_pitch, source, source_pitch, self.piece, self.layers, stream)
            return
        for layer in range(self.layers):  # the pool is too large for a strided copy
            self._cuda.copy(target + layer * target_pitch, source + layer * source_pitch, self.piece, stream)


class HostPages:
    """The engine's Swap: pinned memory for at most `most` pages, all in order with the stream."""

    def __init__(self, cuda: Cudart, pages: Pages, most: int, stream: int) -> None:
        self._cuda, self._pages, self._stream = cuda, pages, stream
        self._size = pages.layers * pages.piece
        self._most = most
        self._slabs: list[PinnedMemory] = []
        self._made = 0
        self._free: list[int] = []  # addresses

    @property
    def room(self) -> int:
        return self._most - self._made + len(self._free)

    def out(self, pages: Sequence[int]) -> list[int] | None:
        if len(pages) > self.room:
            return None
        while len(self._free) < len(pages):
            self._grow()
        places = [self._free.pop() for _ in pages]
        for page, place in zip(pages, places, strict=True):
            self._pages.save(page, place, self._stream)
        return places

    def back(self, handle: list[int], pages: Sequence[int]) -> None:
        for place, page in zip(handle, pages, strict=True):
            self._pages.restore(place, page, self._stream)
        self.drop(handle)

    def drop(self, handle: list[int]) -> None:
        self._free += handle  # who takes a place next copies after what was copied from it: there is one stream

    def _grow(self) -> None:
        count = min(max(1, _SLAB_BYTES // self._size), self._most - self._made)
        slab = PinnedMemory(self._cuda, count * self._size)
        self._slabs.append(slab)
        self._made += count
        self._free += (slab.address + np.arange(count) * self._size).tolist()
