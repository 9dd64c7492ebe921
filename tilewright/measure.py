"""What this machine delivers: the ceilings that floors are compared with, measured and kept for later.

A processor's memory is read and copied by all threads here; a GPU's memory and matrix units by kernels of our own
(measure_gpu.py).
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.compiler import targets
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import cuda, host, measured
from tilewright.compiler.targets.base import Target
from tilewright.compiler.targets.measured import Ceilings

_BUFFER_BYTES = 512 << 20  # well above any last-level cache share
_ROUNDS = 5


@dataclass(frozen=True)
class Figures:
    """What was measured on one device, and the ceilings that its target's record gives."""

    device: str
    measured: Ceilings
    record: Target | None = None


def measure_processor() -> Figures:
    """Measures this machine's memory, and keeps the figures. Raises TargetError where they can't be kept."""
    threads = host.cores()
    found = Ceilings(read_bandwidth_gbs(threads), copy_bandwidth_gbs(threads))
    device = targets.device_name("cpu")
    assert device is not None, "every machine has a processor"
    return Figures(device, measured.write(device, found).ceilings)


def measure_gpu() -> Figures | None:
    """Measures the first GPU, and keeps the figures; None where there is none. Raises TargetError where it can't be
    measured, or the figures can't be kept."""
    device = targets.device_name("cuda")
    if device is None:
        return None
    record = cuda.this_machine()
    obstacle = targets.run_obstacle(record) or targets.compile_obstacle(record)
    if obstacle:
        raise TargetError(f"the GPU {device} can't be measured: {obstacle}")
    from tilewright.measure_gpu import measure

    return Figures(device, measured.write(device, measure(record)).ceilings, record)


def read_bandwidth_gbs(threads: int) -> float:
    """The best of a few reads of 512 MB by `threads` threads, in GB/s.

    The sum of int64 runs in vector registers without waiting for itself, and numpy lets other threads run meanwhile.
    """
    parts = np.array_split(np.ones(_BUFFER_BYTES // 8, np.int64), threads)
    return _best_gbs(_BUFFER_BYTES, threads, np.sum, [parts])


def copy_bandwidth_gbs(threads: int) -> float:
    """The best of a few copies of 256 MB by `threads` threads, in GB/s read and written."""
    source, target = (np.ones(_BUFFER_BYTES // 16, np.int64) for _ in range(2))
    parts = [np.array_split(array, threads) for array in (target, source)]
    return _best_gbs(_BUFFER_BYTES, threads, np.copyto, parts)


def _best_gbs(size: int, threads: int, work: Callable[..., Any], parts: Sequence[Sequence[np.ndarray]]) -> float:
    """GB/s of the fastest round that moves `size` bytes: `work` on every thread, with its part of each argument."""
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(work, *parts))
            best = max(best, size / (time.perf_counter() - start) / 1e9)
    return best
