"""KV pages for the tests of the kernels that write them: formats, poisoned memory, and the append in numpy."""

import numpy as np

from tests.kernel_runner import aligned_empty
from tilewright.compiler.composites import KVFormat

FORMATS = [
    KVFormat(2, 3, 64, 16),
    KVFormat(1, 2, 48, 32, k_transposed=False),
    KVFormat(3, 1, 80, 48),
    KVFormat(2, 2, 40, 16, "float16"),
]
IDS = ["3x64", "rows-2x48", "80-page48", "float16-40"]


def empty_pages(kv: KVFormat, count: int) -> np.ndarray:
    return aligned_empty((kv.layers, count, 2, kv.kv_heads, kv.page_size * kv.head_dim), kv.dtype)


def some_slots(kv: KVFormat, pages: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    slots = rng.permutation(pages * kv.page_size)[:rows].astype(np.int32)
    slots[rng.random(rows) < 0.2] = -1
    return slots


def write(kv: KVFormat, pages: np.ndarray, slots: np.ndarray, k: np.ndarray, v: np.ndarray, layer: int) -> None:
    for t, slot in enumerate(slots):
        if slot >= 0:
            page, offset = pages[layer, slot // kv.page_size], slot % kv.page_size
            shape = (kv.kv_heads, kv.head_dim, kv.page_size)
            rows = (
                page[0].reshape(shape).swapaxes(1, 2) if kv.k_transposed else page[0].reshape(kv.kv_heads, -1, shape[1])
            )
            rows[:, offset] = k[t].astype(kv.dtype)
            page[1].reshape(kv.kv_heads, kv.page_size, kv.head_dim)[:, offset] = v[t].astype(kv.dtype)
