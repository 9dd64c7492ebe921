"""What this machine's memory delivers: the ceiling that floors are compared with."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BUFFER_BYTES = 512 << 20  # well above any last-level cache share
_ROUNDS = 5


def read_bandwidth_gbs(threads: int) -> float:
    """The best of a few reads of 512 MB by `threads` threads, in GB/s.

    The sum of int64 runs in vector registers without waiting for itself, and numpy lets other threads run meanwhile.
    """
    parts = np.array_split(np.ones(_BUFFER_BYTES // 8, np.int64), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, _BUFFER_BYTES / (time.perf_counter() - start) / 1e9)
    return best
