"""A model for the server's own cost: its steps take a fixed time, and no core."""

import time
from typing import Any

import numpy as np

from tests.server.serving import TOKENIZER
from tilewright.runtime.types import DeviceLimits, StepBatch, StepResult


class StubModel:
    """Says the same letter again and again. A step sleeps without Python's lock, as a compiled step runs."""

    limits = DeviceLimits(
        max_batch=128, max_tokens=4096, max_context=1024, page_size=16, num_pages=8192,
        vocab_size=TOKENIZER.vocab_size, top_logprobs=1,
    )  # fmt: skip
    runs_ahead, swap, load_s = False, None, 0.0
    tokenizer: Any = TOKENIZER

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        [self._letter] = TOKENIZER.encode("a")

    def launch(self, batch: StepBatch) -> StepResult:
        time.sleep(self._step_s)
        rows = len(batch.rows)
        none = np.zeros((rows, 1), np.float32)
        return StepResult(np.full(rows, self._letter, np.int32), none[:, 0], none.astype(np.int32), none)

    def collect(self, pending: StepResult) -> StepResult:
        return pending

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        pass
