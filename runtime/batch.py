"""From a plan to the arrays of one step: tokens and where they go, who reads which pages, how each row is drawn."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

from tilewright.compiler.composites import SAMPLING_INPUTS
from tilewright.runtime.kv_cache import pages_for
from tilewright.runtime.request import Sample
from tilewright.runtime.types import StepBatch

_EMPTY = (np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
_PARAMS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class BatchBuilder:
    """Builds StepBatch values. Keeps lookup tables of positions, and the sampling arrays of the last rows."""

    def __init__(self, page_size: int, max_context: int) -> None:
        self._page_size = page_size
        self._position = np.arange(max_context, dtype=np.int32)
        self._page = self._position // page_size
        self._offset = self._position % page_size
        self._rows: list[Sample] = []
        self._settings: dict[str, np.ndarray] = {}

    def build(self, chunks: Sequence[tuple[Sample, int]]) -> tuple[StepBatch, list[Sample]]:
        """The step's arrays, and the sample of each row. The tables already hold pages for the chunks.

        A drawn token that is not known yet goes in as its sample holds it, as the row that draws it.
        """
        step, last = self._step(chunks)
        rows: list[Sample] = []
        places: list[int] = []
        for (sample, tokens), end in zip(chunks, last, strict=True):
            if sample.computed + tokens == sample.known:
                drawing = sample.request.samples if sample.width > 1 else [sample]
                rows += drawing
                places += [end - 1] * len(drawing)
        return StepBatch(rows=np.array(places, np.int32), **step, **self._sampling(rows)), rows

    def prompts(self, chunks: Sequence[tuple[Sample, int]], every: bool) -> dict[str, np.ndarray]:
        """STEP_INPUTS by name, of sequences whose tables may already hold pages for more tokens than these.

        Its rows are every token, or the last one of each sequence that is complete with them.
        """
        step, last = self._step(chunks)
        pages = [s.table.array[: pages_for(s.computed + tokens, self._page_size)] for s, tokens in chunks]
        step |= {"page_indptr": _indptr(map(len, pages)), "page_indices": np.concatenate(pages)}
        if every:
            return step | {"rows": np.arange(last[-1], dtype=np.int32)}
        ends = [e - 1 for (s, tokens), e in zip(chunks, last, strict=True) if s.computed + tokens == s.known]
        return step | {"rows": np.array(ends, np.int32)}

    def _step(self, chunks: Sequence[tuple[Sample, int]]) -> tuple[dict[str, np.ndarray], list[int]]:
        """STEP_INPUTS but rows, and where each sequence's tokens end."""
        last = list(accumulate(tokens for _, tokens in chunks))
        ids, positions, slots = (np.empty(last[-1], np.int32) for _ in range(3))
        begin, page_size = 0, self._page_size
        for (sample, _), end in zip(chunks, last, strict=True):
            first, stop = sample.computed, sample.computed + end - begin
            if stop == first + 1:  # a decode: numbers are cheaper than slices
                ids[begin] = sample.tokens[first]
                positions[begin] = first
                slots[begin] = sample.table.pages[first // page_size] * page_size + first % page_size
            else:
                ids[begin:end] = sample.tokens[first:stop]
                positions[begin:end] = self._position[first:stop]
                slots[begin:end] = sample.table.array[self._page[first:stop]] * page_size + self._offset[first:stop]
            begin = end
        arrays = {
            "tokens": ids,
            "positions": positions,
            "slots": slots,
            "indptr": np.array([0, *last], np.int32),
            "page_indptr": _indptr(len(sample.table) for sample, _ in chunks),
            "page_indices": np.concatenate([sample.table.array for sample, _ in chunks]),
            "kv_len": np.array([sample.computed + tokens for sample, tokens in chunks], np.int32),
            "phases": np.array([sample.generating for sample, _ in chunks], np.int32),
        }
        return arrays, last

    def _sampling(self, rows: list[Sample]) -> dict[str, np.ndarray]:
        if rows != self._rows or not self._settings:
            self._rows, self._settings = rows, _settings(rows)
        counts = [sample.counts for sample in rows]
        biases = [sample.bias for sample in rows]
        listed = any(c is not None for c in counts)
        biased = any(len(b.tokens) for b in biases)
        none = np.zeros(len(rows) + 1, np.int32)
        return self._settings | {
            "draws": np.array([sample.drawn for sample in rows], np.int32),
            "penalty_indptr": _indptr(0 if c is None else len(c.tokens) for c in counts) if listed else none,
            "penalty_tokens": np.concatenate([c.tokens for c in counts if c is not None]) if listed else _EMPTY[0],
            "penalty_counts": np.concatenate([c.counts for c in counts if c is not None]) if listed else _EMPTY[1],
            "bias_indptr": _indptr(len(b.tokens) for b in biases) if biased else none,
            "bias_tokens": np.concatenate([b.tokens for b in biases]) if biased else _EMPTY[0],
            "bias_values": np.concatenate([b.values for b in biases]) if biased else _EMPTY[2],
        }


def _settings(rows: list[Sample]) -> dict[str, np.ndarray]:
    """The part of SAMPLING_INPUTS that stays the same for a sample's whole life."""
    arrays = {name: [getattr(s.request.params, name) for s in rows] for name in _PARAMS}
    arrays["seeds"] = [s.seed for s in rows]
    arrays["alternatives"] = [s.request.params.logprobs or 0 for s in rows]
    return {name: np.array(values, SAMPLING_INPUTS[name][1]) for name, values in arrays.items()}


def _indptr(sizes: Iterable[int]) -> np.ndarray:
    return np.array(list(accumulate(sizes, initial=0)), np.int32)
