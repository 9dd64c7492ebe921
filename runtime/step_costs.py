"""What steps take on the machine at hand, learnt from those that ran.

One fit for all steps: a constant, the sequences that decode, and the keys that are read, each once however many of its
sequence's tokens attend to it; and for prompts a constant, their tokens, and the pairs of token and key beyond the
first of each key. A prompt's keys count as a stream's do, so that the steps with prompts, of which thousands may follow
each other, also tell how the streams beside them grow slower. Fits weigh errors by the time of the step, forget old
steps of their own kind, with prompts or without, and have no negative coefficients.

What few tokens took says little of many: a step with more than twice the prompt tokens of those that ran lately is not
known. The times say when things are computed, and never what: tokens are the same whatever is learnt here.
"""

from collections.abc import Callable

import numpy as np

from tilewright.runtime.types import Work

_MEMORY = 0.99  # of a step's weight is left after the next of its kind: about the last hundred count
_GROWTH = 2  # times the prompt tokens of steps that ran are foreseen
_RIDGE = 1e-5
_SWEEPS = 8
# A step may run faster than those before it on a shared machine. What is below this part of their time can't be met.
_AT_BEST = 0.8
# Of the features, which are about as large then. What always comes together, such as prompts and one token of theirs,
# shares its cost by the squares of these.
_UNITS = np.array([1.0, 8.0, 16384.0, 8.0, 8.0, 16384.0])


class StepCosts:
    """Implements types.Costs. floor: the least seconds of a step by its bytes and operations, where they are known."""

    def __init__(self, floor: Callable[[Work], float] | None = None) -> None:
        self._floor = floor
        self._decodes, self._prompts = _Steps(), _Steps()
        self._tried = 0.0  # prompt tokens of a step, at the most and lately
        self._coefficients: np.ndarray = np.zeros(len(_UNITS))
        self._solved = True

    def step_s(self, work: Work) -> float | None:
        if not self._kind(work).seen or work.prompt_tokens > _GROWTH * self._tried:
            return None
        if not self._solved:
            self._solve()
        return float(_features(work) @ self._coefficients)

    def least_s(self, work: Work) -> float:
        floor_s = 0.0 if self._floor is None else self._floor(work)
        return max(floor_s, _AT_BEST * (self.step_s(work) or 0.0))

    def observe(self, work: Work, seconds: float) -> None:
        self._kind(work).observe(_features(work), seconds)
        if work.prompt_tokens:
            self._tried = max(work.prompt_tokens, _MEMORY * self._tried)
        self._solved = False

    def _kind(self, work: Work) -> "_Steps":
        return self._prompts if work.prompt_tokens else self._decodes

    def _solve(self) -> None:
        """Least squares by coordinate descent from the last solution: steps come one by one, and change it little."""
        products = self._decodes.products + self._prompts.products
        targets = (self._decodes.targets + self._prompts.targets).tolist()
        size, seen = len(targets), self._decodes.seen + self._prompts.seen
        ridge = _RIDGE * np.trace(products) / size
        rows, found = (products + ridge * np.eye(size)).tolist(), self._coefficients.tolist()
        for _ in range(_SWEEPS if seen > size else 100 * _SWEEPS):
            for i, row in enumerate(rows):
                rest = targets[i] - sum(a * b for a, b in zip(row, found, strict=True)) + row[i] * found[i]
                found[i] = max(0.0, rest / row[i])
        self._coefficients = np.array(found)
        self._solved = True


def _features(work: Work) -> np.ndarray:
    shared = work.pairs - work.prompt_keys
    each = (1.0, work.decodes, work.keys + work.prompt_keys, work.prompt_tokens > 0, work.prompt_tokens, shared)
    return np.array(each) / _UNITS


class _Steps:
    """The normal equations of steps of one kind."""

    def __init__(self) -> None:
        size = len(_UNITS)
        self.seen, self.products, self.targets = 0, np.zeros((size, size)), np.zeros(size)

    def observe(self, features: np.ndarray, seconds: float) -> None:
        weight = 1.0 / max(seconds, 1e-6) ** 2
        self.products = _MEMORY * self.products + weight * np.outer(features, features)
        self.targets = _MEMORY * self.targets + weight * seconds * features
        self.seen += 1
