"""Hidden states of prompts on the GPU: inputs there by one copy, and the wanted rows back, on memory of their own.

Steps keep their slots: a chunk of prompts comes between two steps of the stream and is waited for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tilewright.compiler.composites import STEP_INPUTS
from tilewright.runtime.cuda.arena import Extents, extent
from tilewright.runtime.cuda.cudart import Cudart
from tilewright.runtime.cuda.memory import DeviceMemory, PinnedMemory, aligned, tensor, tensor_bytes


class HiddenStates:
    """Calls the compiled function `hidden`. most: the largest extents, by the symbols of STEP_INPUTS.

    finish: waits until what is on the stream so far is done.
    """

    def __init__(self, cuda: Cudart, ffi: Any, most: Extents, stream: int, finish: Callable[[], None]) -> None:
        self._cuda, self._ffi, self._stream, self._finish = cuda, ffi, stream, finish
        self._offsets: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in STEP_INPUTS.items():
            self._offsets[name] = size
            size = aligned(size + extent(shape, most) * np.dtype(dtype).itemsize)
        self._device, self._host = DeviceMemory(cuda, size), PinnedMemory(cuda, size)
        self._results = PinnedMemory(cuda, 1)

    def __call__(self, function: Any, inputs: Mapping[str, np.ndarray], pages: Any, weights: Any) -> np.ndarray:
        """float32[r, hidden]. inputs: STEP_INPUTS by name."""
        for name, offset in self._offsets.items():
            raw = np.ascontiguousarray(inputs[name]).view(np.uint8)
            self._host.array[offset : offset + raw.nbytes] = raw
        self._cuda.copy(self._device.address, self._host.address, self._host.size, self._stream)
        tensors = [self._tensor(name, inputs[name]) for name in STEP_INPUTS]
        states = function(*tensors, pages, weights)
        shape, dtype = tuple(states.shape), str(states.dtype)
        size = tensor_bytes(shape, dtype)
        if size > self._results.size:
            self._results = PinnedMemory(self._cuda, size)
        if size:
            self._cuda.copy(self._results.address, states.data_ptr(), size, self._stream)
        self._finish()
        return widened(self._results.array[:size], shape, dtype)

    def _tensor(self, name: str, array: np.ndarray) -> Any:
        address = self._device.address + self._offsets[name]
        return tensor(self._ffi, self._cuda.device_type, address, array.shape, str(array.dtype))


def widened(raw: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A copy of raw bytes, uint8[n], as an array; 16-bit floats as the float32 of the same value."""
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    values = raw.view(dtype).reshape(shape)
    return values.astype(np.float32) if dtype == "float16" else values.copy()
