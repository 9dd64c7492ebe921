"""Logits of several sequences a step, from a compiled model, over pages of the test's own."""

from collections.abc import Mapping, Sequence

import numpy as np

import tilewright
from tilewright.compiler.artifact import aligned_copy
from tilewright.compiler.composites import STEP_INPUTS


class LogitsBatch:
    """Sequences that share pages, which hold NaN wherever no token stands; pages are dealt in random order."""

    def __init__(self, model: tilewright.Model, num_pages: int = 64) -> None:
        self.model = model
        self.array, self.pages = model.executor.make_pages(num_pages)
        self.array[...] = np.nan
        self.free = np.random.default_rng().permutation(num_pages).tolist()
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, request: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Adds tokens to some sequences (by name), in one step. -> float32[new tokens, vocab] for each of them."""
        size = self.model.limits.page_size
        tokens, positions, slots, indptr, page_indptr, page_indices, kv_len = [], [], [], [0], [0], [], []
        for name, new in request.items():
            table = self.tables.setdefault(name, [])
            start = self.lengths.get(name, 0)
            self.lengths[name] = end = start + len(new)
            while len(table) * size < end:
                table.append(self.free.pop())
            tokens += new
            positions += range(start, end)
            slots += [table[p // size] * size + p % size for p in range(start, end)]
            indptr.append(len(tokens))
            page_indices += table
            page_indptr.append(len(page_indices))
            kv_len.append(end)
        arrays = {
            "tokens": tokens,
            "positions": positions,
            "slots": slots,
            "indptr": indptr,
            "page_indptr": page_indptr,
            "page_indices": page_indices,
            "kv_len": kv_len,
            "phases": [0] * len(kv_len),
            "rows": range(len(tokens)),
        }
        executor = self.model.executor
        inputs = [executor.ffi.from_dlpack(aligned_copy(np.array(arrays[n], np.int32))) for n in STEP_INPUTS]
        logits = np.from_dlpack(executor.vm["logits"](*inputs, self.pages, executor.weights)).copy()
        return {name: logits[a:b] for name, a, b in zip(request, indptr, indptr[1:], strict=False)}
