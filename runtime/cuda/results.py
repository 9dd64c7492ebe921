"""What a step draws: where the next step finds it on the GPU, and how it comes back to the host."""

from typing import Any

import numpy as np

from tilewright.runtime.cuda.arena import SLOTS
from tilewright.runtime.cuda.cudart import Cudart
from tilewright.runtime.cuda.memory import DeviceMemory, PinnedMemory, tensor
from tilewright.runtime.types import StepResult

_ITEM = 4  # bytes of a token id, and of a log-probability


class Results:
    """Fixed memory for the results of one step on the GPU, and for those of the last two on the host.

    ids[R] logprobs[R] top_ids[R, L] top_logprobs[R, L]: a step without alternatives is read back by its first bytes.
    """

    def __init__(self, cuda: Cudart, ffi: Any, rows: int, alternatives: int) -> None:
        self._cuda = cuda
        self._rows, self._alternatives = rows, alternatives
        self._offsets = [part * rows * _ITEM for part in (0, 1, 2, 2 + alternatives)]
        size = rows * _ITEM * (2 + 2 * alternatives)
        self._device = DeviceMemory(cuda, size)
        self._hosts = [PinnedMemory(cuda, size) for _ in range(SLOTS)]
        self.ids = tensor(ffi, cuda.device_type, self._device.address, (rows,), "int32")

    def keep(self, outputs: Any, rows: int, stream: int) -> None:
        """Copies the tokens and their log-probabilities to where they stay: the outputs' memory is used again."""
        for output, offset in zip(list(outputs)[:2], self._offsets[:2], strict=True):
            self._cuda.copy(self._device.address + offset, output.data_ptr(), rows * _ITEM, stream)

    def keep_alternatives(self, outputs: Any, rows: int, stream: int) -> None:
        size = rows * self._alternatives * _ITEM
        for output, offset in zip(list(outputs)[2:], self._offsets[2:], strict=True):
            self._cuda.copy(self._device.address + offset, output.data_ptr(), size, stream)

    def fetch(self, alternatives: bool, slot: int, stream: int) -> None:
        """Brings what was kept to the slot's memory, in order with the stream."""
        host = self._hosts[slot]
        size = host.size if alternatives else self._offsets[2]
        self._cuda.copy(host.address, self._device.address, size, stream)

    def read(self, rows: int, slot: int) -> StepResult:
        """Views of the slot's memory. Alternatives that were not fetched are those of an earlier step."""
        memory, count = self._hosts[slot].array, self._alternatives
        ids, logprobs, top_ids, top_logprobs = self._offsets
        return StepResult(
            token_ids=_part(memory, ids, rows, np.int32),
            logprobs=_part(memory, logprobs, rows, np.float32),
            top_ids=_part(memory, top_ids, rows * count, np.int32).reshape(rows, count),
            top_logprobs=_part(memory, top_logprobs, rows * count, np.float32).reshape(rows, count),
        )


def _part(memory: np.ndarray, start: int, count: int, dtype: Any) -> np.ndarray:
    return memory[start : start + count * _ITEM].view(dtype)
