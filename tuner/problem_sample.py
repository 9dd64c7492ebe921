"""The sampler."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright.compiler.composites import SAMPLING_INPUTS, SampleSpec
from tilewright.tuner.problem_base import Array, Compared, Composite, Rng, normal


class Sample(Composite):
    """Rows by turns greedy and drawn with top-k and top-p; what is greedy is compared with numpy."""

    spec: SampleSpec
    settled = (0, 1)

    def arguments(self, rng: Rng) -> list[Array | int]:
        rows, drawn = self.rows, np.arange(self.rows) % 2
        values: dict[str, Any] = {
            "temperature": drawn * 0.8,
            "top_k": drawn * 50,
            "top_p": 1 - drawn * 0.1,
            "repetition_penalty": np.ones(rows),
            "seeds": np.arange(rows) + 1,
        }
        lists = {"r": rows, "r+1": rows + 1, "c": 1, "e": 1}
        inputs = [np.asarray(values.get(n, np.zeros(lists[e])), d) for n, (e, d) in SAMPLING_INPUTS.items()]
        return [normal((rows, self.spec.vocab), rng, scale=4.0), *inputs]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        logits = arguments[0][::2].astype(np.float64)
        peak = logits.max(1, keepdims=True)
        expected = -np.log(np.exp(logits - peak).sum(1))
        said, last = results[0][::2], self.spec.vocab - 1
        theirs = np.take_along_axis(logits, np.clip(said, 0, last)[:, None], 1)[:, 0]
        chosen = np.where((said >= 0) & (said <= last), theirs, np.nan)
        return [
            Compared("the greedy choice", chosen, peak[:, 0], 0.0),
            Compared("its log-probability", results[1][::2], expected, 1e-4),
        ]
