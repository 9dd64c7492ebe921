"""What steps take on the machine at hand, learnt from those that ran.

Steps that only decode are fitted by a constant, the sequences and the keys that they attend to. What prompts add to a
step is fitted by their tokens and those tokens' keys alone, without a constant: whatever a step with prompts costs in
itself counts as the tokens' own, so that more tokens than were seen are expected to take too long rather than too
short. Fits weigh errors by the time of the step, forget old steps of their own kind, and have no negative coefficients.

The times say when things are computed, and never what: tokens are the same whatever is learnt here.
"""

from collections.abc import Callable

import numpy as np

from tilewright.runtime.types import Work

_MEMORY = 0.99  # of a step's weight is left after the next of its kind: about the last hundred count
# Of a step with prompts, so much at least is theirs: a wrong guess of the rest must not make them look free,
# which would let the next step have any number of them.
_LEAST_PART = 0.2
_RIDGE = 1e-5
_SWEEPS = 8
# A step may run faster than those before it on a shared machine. What is below this part of their time can't be met.
_AT_BEST = 0.8
_UNITS = np.array([1.0, 8.0, 16384.0])  # of the features, which are about as large then


class StepCosts:
    """Implements types.Costs. floor: the least seconds of a step by its bytes and operations, where they are known."""

    def __init__(self, floor: Callable[[Work], float] | None = None) -> None:
        self._floor = floor
        self._decodes, self._prompts = _Fit(3), _Fit(2)

    def step_s(self, work: Work) -> float | None:
        if not work.prompt_tokens:
            return self._decodes.predict(_decode_features(work)) if self._decodes.seen else None
        if not self._prompts.seen:
            return None
        return self._beside(work) + self._prompts.predict(_prompt_features(work))

    def least_s(self, work: Work) -> float:
        floor_s = 0.0 if self._floor is None else self._floor(work)
        return max(floor_s, _AT_BEST * (self.step_s(work) or 0.0))

    def observe(self, work: Work, seconds: float) -> None:
        if not work.prompt_tokens:
            self._decodes.observe(_decode_features(work), seconds, seconds)
        else:
            own_s = max(seconds - self._beside(work), _LEAST_PART * seconds)
            self._prompts.observe(_prompt_features(work), own_s, seconds)

    def _beside(self, work: Work) -> float:
        """What the step's decodes take without its prompts."""
        if not work.decodes or not self._decodes.seen:
            return 0.0
        return self._decodes.predict(_decode_features(work))


def _decode_features(work: Work) -> np.ndarray:
    return np.array((1.0, work.decodes, work.keys)) / _UNITS


def _prompt_features(work: Work) -> np.ndarray:
    return np.array((work.prompt_tokens, work.pairs)) / _UNITS[1:]


class _Fit:
    """Least squares without negative coefficients, by the normal equations of weighted steps."""

    def __init__(self, features: int) -> None:
        self.seen = 0
        self._products, self._targets = np.zeros((features, features)), np.zeros(features)
        self._coefficients: np.ndarray = np.zeros(features)
        self._solved = True

    def observe(self, features: np.ndarray, seconds: float, scale_s: float) -> None:
        """scale_s: errors count relative to it."""
        weight = 1.0 / max(scale_s, 1e-6) ** 2
        self._products = _MEMORY * self._products + weight * np.outer(features, features)
        self._targets = _MEMORY * self._targets + weight * seconds * features
        self.seen += 1
        self._solved = False

    def predict(self, features: np.ndarray) -> float:
        if not self._solved:
            self._solve()
        return float(features @ self._coefficients)

    def _solve(self) -> None:
        """Coordinate descent from the last solution: steps come one by one, and change it little."""
        size = len(self._targets)
        ridge = _RIDGE * np.trace(self._products) / size
        products, found = (self._products + ridge * np.eye(size)).tolist(), self._coefficients.tolist()
        for _ in range(_SWEEPS if self.seen > size else 100 * _SWEEPS):
            for i, row in enumerate(products):
                rest = self._targets[i] - sum(a * b for a, b in zip(row, found, strict=True)) + row[i] * found[i]
                found[i] = max(0.0, rest / row[i])
        self._coefficients = np.array(found)
        self._solved = True
