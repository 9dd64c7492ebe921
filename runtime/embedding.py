"""Prompts of which hidden states are wanted, and no answer: a queue of their own beside what the policy plans.

A turn computes one chunk of them (`Budget.max_chunk` tokens), when the step's tokens are handed out, so that a running
sample waits for one step more at most. Pages come from the pool: a prompt starts when all of it fits beside what the
running samples will want next, and never before a more senior sample that waits. Where a running sample would
have to stop for want of pages, prompts that are junior to it give theirs back and start over later.
"""

from bisect import insort

import numpy as np

from tilewright.runtime.batch import BatchBuilder
from tilewright.runtime.kv_cache import PagePool, pages_for
from tilewright.runtime.request import Sample
from tilewright.runtime.scheduler.policy import Budget
from tilewright.runtime.types import Executor

Rank = tuple[int, int, int]


class Embedder:
    """waiting, running: in order of seniority; those that run hold pages for their whole prompts."""

    def __init__(self, executor: Executor, budget: Budget, pool: PagePool, builder: BatchBuilder) -> None:
        self._executor, self._budget, self._pool, self._builder = executor, budget, pool, builder
        self._mean = executor.limits.pooling == "mean"
        self._sums: dict[Sample, np.ndarray] = {}  # float64[hidden], of the states so far
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []

    def admit(self, ahead: Rank | None, promised: int, now_s: float) -> None:
        """Starts those that fit, most senior first. ahead: the most senior sample that waits for pages as well.
        promised: pages that running samples will want."""
        while self.waiting and len(self.running) < self._budget.max_batch:
            head = self.waiting[0]
            if ahead is not None and ahead < head.rank:
                return
            if pages_for(head.length, self._pool.page_size) + promised > self._pool.free:
                return
            self.waiting.pop(0)
            self._pool.extend(head.table, 0, head.length)
            insort(self.running, head, key=_rank)
            head.request.start(now_s)

    def compute(self) -> tuple[int, list[tuple[Sample, np.ndarray]]]:
        """One chunk of the running ones -> (tokens, those that are complete with it, which hold no pages any more).
        Each comes with its float32[hidden] of length 1."""
        chunks = self._chunks()
        if not chunks:
            return 0, []
        inputs = self._builder.prompts(chunks, self._mean)
        states = self._executor.hidden(inputs)
        done, row = [], 0
        for sample, tokens in chunks:
            sample.computed += tokens
            complete = sample.computed == sample.length
            rows = tokens if self._mean else int(complete)
            pooled = self._pooled(sample, states[row : row + rows])
            row += rows
            if complete:
                self.drop(sample)
                done.append((sample, pooled))
        return sum(tokens for _, tokens in chunks), done

    def drop(self, sample: Sample) -> None:
        """Forgets a sample of either list, and frees its pages."""
        for samples in (self.waiting, self.running):
            if sample in samples:
                samples.remove(sample)
        self._sums.pop(sample, None)
        self._pool.release(sample.table)

    def give_way(self, senior: Rank) -> bool:
        """The most junior of those that run frees its pages and will start over, if it is junior to `senior`. Says
        whether it did."""
        if not self.running or self.running[-1].rank < senior:
            return False
        junior = self.running[-1]
        self.drop(junior)
        junior.computed = 0
        insort(self.waiting, junior, key=_rank)
        return True

    def _chunks(self) -> list[tuple[Sample, int]]:
        left, chunks = self._budget.max_chunk, []
        for sample in self.running:
            tokens = min(left, sample.length - sample.computed)
            if tokens == 0:
                break
            chunks.append((sample, tokens))
            left -= tokens
        return chunks

    def _pooled(self, sample: Sample, states: np.ndarray) -> np.ndarray:
        """The mean of all states so far, or the last of these, made 1 long. Sums go token by token, so that chunks of
        any size give the same bits."""
        if self._mean:
            before = self._sums.get(sample)
            states = states.astype(np.float64)
            self._sums[sample] = np.add.reduce(states if before is None else np.vstack([before, states]), axis=0)
            vector = self._sums[sample] / sample.computed
        elif len(states):
            vector = states[-1].astype(np.float64)
        else:  # its last token is in a later chunk
            return np.empty(0, np.float32)
        return (vector / max(float(np.linalg.norm(vector)), 1e-30)).astype(np.float32)


def _rank(sample: Sample) -> Rank:
    return sample.rank
