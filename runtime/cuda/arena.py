"""A step's inputs on their way to the GPU, by one copy: arrays of fixed places first, the lists of any length last.

Every bucket has a layout of its own over the same memory, with room for the most that it takes; so a captured graph
finds its inputs where they were when it was captured. What a bucket has more than the batch is filled with padding that
changes nothing: sequences without tokens in the cache, whose slots are below 0, and rows that draw greedily.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS
from tilewright.runtime.cuda.cudart import Cudart
from tilewright.runtime.cuda.memory import DeviceMemory, PinnedMemory, aligned, tensor
from tilewright.runtime.types import StepBatch

INPUTS = STEP_INPUTS | SAMPLING_INPUTS
SLOTS = 2  # batches on the host at a time: one whose step runs, one that is being made
_LISTS = ("page_indices", "bias_tokens", "bias_values", "penalty_tokens", "penalty_counts")
_LIST_SYMBOLS = ("p", "c", "e")
_ORDER = (*(name for name in INPUTS if name not in _LISTS), *_LISTS)
_ALIGNMENT = 64  # bytes
_MOST_VIEWS = 4096  # tensors kept for lengths seen, a layout
_PADDING = {"slots": -1, "phases": 1, "top_p": 1, "repetition_penalty": 1}  # 0 for all others

Extents = Mapping[str, int]  # by the symbols of INPUTS: t tokens, b sequences, r rows, p, c, e list entries


def extent(shape: str, extents: Extents) -> int:
    """The length of an array whose shape is a symbol, or a symbol and one."""
    symbol, _, more = shape.partition("+")
    return extents[symbol] + int(more or 0)


def extents_of(batch: StepBatch) -> dict[str, int]:
    return {
        "t": len(batch.tokens),
        "b": len(batch.kv_len),
        "r": len(batch.rows),
        "p": len(batch.page_indices),
        "c": len(batch.penalty_tokens),
        "e": len(batch.bias_tokens),
    }


class Layout:
    """Where each input of a bucket lies. most: the longest that each may be."""

    def __init__(self, most: Extents) -> None:
        self.most = dict(most)
        self.offsets: dict[str, int] = {}
        end = 0
        for name in _ORDER:
            shape, dtype = INPUTS[name]
            self.offsets[name] = end
            end = aligned(end + extent(shape, most) * np.dtype(dtype).itemsize, _ALIGNMENT)
        self.size = end

    def over(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """Every input at its most, as arrays over uint8[size]."""
        return {name: self._view(memory, name) for name in _ORDER}

    def _view(self, memory: np.ndarray, name: str) -> np.ndarray:
        shape, dtype = INPUTS[name]
        start = self.offsets[name]
        return memory[start : start + extent(shape, self.most) * np.dtype(dtype).itemsize].view(dtype)

    def fill(self, arrays: Mapping[str, np.ndarray], batch: StepBatch, extents: Extents) -> list[tuple[int, int]]:
        """Writes the batch, padded to `extents`, into arrays as `over` gives them. Returns the spans of bytes (offset,
        size) that hold it: one, and one more for each list of biases and penalties that is not empty."""
        for name in _ORDER:
            values, target = getattr(batch, name), arrays[name]
            have = len(values)
            target[:have] = values
            if name not in _LISTS:
                want = extent(INPUTS[name][0], extents)
                if want > have:
                    target[have:want] = _padding(name, values, have, want)
        pages = self.offsets["page_indices"]
        spans = [(0, pages + batch.page_indices.nbytes)]
        spans += [(self.offsets[n], size) for n in _LISTS[1:] if (size := getattr(batch, n).nbytes)]
        return spans


def _padding(name: str, values: np.ndarray, have: int, want: int) -> Any:
    if name in ("indptr", "rows"):  # a token for each sequence, and each row its own
        return np.arange(have, want)
    if name.endswith("indptr"):  # nothing on the list
        return values[-1]
    return _PADDING.get(name, 0)


class Arena:
    """The memory that all layouts lie over: on the GPU once, on the host once for each slot."""

    def __init__(self, cuda: Cudart, ffi: Any, buckets: Mapping[str, Extents], lists: Extents) -> None:
        """buckets: the most tokens, sequences and rows, by name. lists: room for list entries."""
        self._cuda, self._ffi = cuda, ffi
        self._buckets = buckets
        self._make({symbol: lists[symbol] for symbol in _LIST_SYMBOLS})

    def _make(self, lists: dict[str, int]) -> None:
        self.lists = lists
        self.layouts = {name: Layout({**most, **lists}) for name, most in self._buckets.items()}
        size = max(layout.size for layout in self.layouts.values())
        self._device = DeviceMemory(self._cuda, size)
        self._hosts = [PinnedMemory(self._cuda, size) for _ in range(SLOTS)]
        self._arrays = {
            (name, slot): layout.over(self._hosts[slot].array)
            for name, layout in self.layouts.items()
            for slot in range(SLOTS)
        }
        self._tensors: dict[str, dict[tuple[str, int], Any]] = {name: {} for name in self.layouts}

    def holds(self, batch: StepBatch) -> bool:
        have = extents_of(batch)
        return all(have[symbol] <= room for symbol, room in self.lists.items())

    def grow(self, batch: StepBatch) -> None:
        """Makes room for the batch's lists. Nothing may use the memory any more, no graph either."""
        have = extents_of(batch)
        self._make({symbol: max(room, 2 * have[symbol]) for symbol, room in self.lists.items()})

    def send(self, bucket: str, batch: StepBatch, extents: Extents, slot: int, stream: int) -> None:
        """Fills the slot's memory and copies it to the GPU, in order with the stream."""
        layout, host = self.layouts[bucket], self._hosts[slot]
        for offset, size in layout.fill(self._arrays[bucket, slot], batch, extents):
            self._cuda.copy(self._device.address + offset, host.address + offset, size, stream)

    def tensors(self, bucket: str, extents: Extents) -> list[Any]:
        """The inputs in order, on the GPU. The lists are as long as there is room for."""
        kept = self._tensors[bucket]
        if len(kept) >= _MOST_VIEWS:
            kept.clear()
        return [self._tensor(bucket, kept, name, extents) for name in INPUTS]

    def _tensor(self, bucket: str, kept: dict[tuple[str, int], Any], name: str, extents: Extents) -> Any:
        shape, dtype = INPUTS[name]
        length = extent(shape, self.lists if name in _LISTS else extents)
        found = kept.get((name, length))
        if found is None:
            address = self._device.address + self.layouts[bucket].offsets[name]
            found = kept[name, length] = tensor(self._ffi, self._cuda.device_type, address, (length,), dtype)
        return found
