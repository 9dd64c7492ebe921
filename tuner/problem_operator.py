"""Plain operators, whose reference is what their loops say."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright.tuner import loops
from tilewright.tuner.problem_base import CLOSE, Array, Compared, Composite, Rng, normal, numpy_dtype


class Operator(Composite):
    """The results' every bit is settled: a trace may not add up in another order."""

    @property
    def settled(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(len(self.spec.shapes) - self.spec.inputs))

    def arguments(self, rng: Rng) -> list[Array | int]:
        """Integers are below every leading extent, since they may say which row is meant."""
        spec = self.spec
        given = list(zip(spec.shapes, spec.dtypes, strict=True))[: spec.inputs]
        least = min((shape[0] for shape, _ in given if shape), default=1)
        return [
            rng.integers(0, least, shape).astype(dtype) if _integral(dtype) else normal(shape, rng, dtype)
            for shape, dtype in given
        ]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        spec = self.spec
        expected = [np.zeros(s, numpy_dtype(d)) for s, d in zip(spec.shapes, spec.dtypes, strict=True)][spec.inputs :]
        loops.run(spec.reference, [*arguments, *expected])
        return [
            Compared(f"y{i}", result, wanted, CLOSE.get(str(wanted.dtype), 0.0))
            for i, (result, wanted) in enumerate(zip(results, expected, strict=True))
        ]


def _integral(dtype: str) -> bool:
    return numpy_dtype(dtype).kind in "iub"
