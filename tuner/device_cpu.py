"""This machine's processor, as measuring.py wants a device."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.compiler.artifact import aligned_empty
from tilewright.compiler.targets import host
from tilewright.runtime.library import load_runtime
from tilewright.tuner.candidates import Candidate

_SAMPLE_S = 0.01
_MOST_SAMPLE_S = 0.1  # but two calls: what is far slower than its data need not be timed on all copies of them


@dataclass(frozen=True)
class _Held:
    array: np.ndarray
    tensor: Any


class CpuDevice:
    """Kernels run on as many threads as the environment says, each on a core of its own."""

    spread_bytes = 32 << 20  # above second-level caches; a model's weights lie in the third, or behind it
    most_copies = 64

    def __init__(self) -> None:
        host.features()  # asks for what kernels may use
        self._ffi = load_runtime()

    def upload(self, array: np.ndarray) -> _Held:
        held = aligned_empty(array.shape, array.dtype)
        held[...] = array
        return _Held(held, self._ffi.from_dlpack(held))

    def refill(self, held: _Held, array: np.ndarray) -> None:
        held.array[...] = array

    def download(self, held: _Held) -> np.ndarray:
        return held.array.copy()

    def load(self, candidate: Candidate) -> Mapping[str, Callable[..., None]]:
        module = _load(candidate.library)
        return {launch.symbol: module[launch.symbol] for launch in candidate.launches}

    def run(self, call: Callable[[], None]) -> None:
        call()

    def timer(self, calls: Sequence[Callable[[], None]]) -> Callable[[], float]:
        start = time.perf_counter()
        for count, call in enumerate(calls, 1):
            call()
            if count > 1 and time.perf_counter() - start > _MOST_SAMPLE_S:
                calls = calls[:count]
                break
        rounds = max(1, round(_SAMPLE_S / (time.perf_counter() - start)))

        def sample() -> float:
            start = time.perf_counter()
            for _ in range(rounds):
                for call in calls:
                    call()
            return (time.perf_counter() - start) / (rounds * len(calls)) * 1e6

        return sample

    def state(self) -> tuple[float | None, float | None]:
        """Of the first core, where Linux tells."""
        match = re.search(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return float(match.group(1)) if match else None, None


@cache
def _load(library: str) -> Any:
    return load_runtime().load_module(library)
