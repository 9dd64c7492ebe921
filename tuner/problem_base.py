"""What the composites of problems.py share: numbers to call kernels with, and how far results may be off."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from tilewright.compiler.composites import GatedSpec, NormSpec

if TYPE_CHECKING:
    from tilewright.tuner.problems import Problem

_CHECKED = 32  # rows of a result, and panels of its columns, that are compared with numpy

# How far a result may be off, by its norm and by its largest entry: rounding of results, or of the activations that a
# kernel multiplies. What is wrong is off by far more.
CLOSE = {"float32": 1e-4, "bfloat16": 6e-3, "float16": 1e-3}
CLOSE_BITS = {16: 1e-3, 8: 3e-2}

Array = np.ndarray
Rng = np.random.Generator


@dataclass(frozen=True)
class Compared:
    what: str
    actual: Array
    expected: Array
    most_error: float


class Composite(ABC):
    """What Problem asks of one composite."""

    layer_argument: int | None = None
    settled: tuple[int, ...] = (0,)
    more_bytes = 0
    more_operations = 0

    def __init__(self, problem: "Problem") -> None:
        self.problem = problem
        self.spec: Any = problem.spec
        self.rows = problem.rows

    @property
    def close(self) -> float:
        return CLOSE[getattr(self.spec, "dtype", "float32")]

    @abstractmethod
    def arguments(self, rng: Rng) -> list[Array | int]: ...

    @abstractmethod
    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]: ...


def distance(actual: Array, expected: Array) -> float:
    """The larger of: the norm of the difference by the expected's; its largest entry by that of the expected. NaN where
    there is a NaN."""
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    difference = actual - expected
    norm, peak = np.linalg.norm(expected), np.abs(expected).max()
    if not norm:
        return float(np.abs(difference).max())
    return float(np.maximum(np.linalg.norm(difference) / norm, np.abs(difference).max() / peak))


def numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def normal(shape: Sequence[int], rng: Rng, dtype: str = "float32", scale: float = 1.0) -> Array:
    """Normal numbers, which repeat after a prime number of them: to draw hundreds of millions would take seconds."""
    block = (rng.standard_normal(262147, np.float32) * np.float32(scale)).astype(numpy_dtype(dtype))
    return np.resize(block, tuple(shape))


def some(count: int, rng: Rng) -> Array:
    """Some of so many indices, the first and the last among them, in order."""
    if count <= _CHECKED:
        return np.arange(count)
    between = rng.choice(np.arange(1, count - 1), _CHECKED - 2, replace=False)
    return np.sort(np.concatenate([[0, count - 1], between]))


def norm(spec: NormSpec, x: Array, weight: Array) -> Array:
    x = x.astype(np.float32)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(spec.eps)) * weight


def gated(spec: GatedSpec, x: Array) -> Array:
    gate, up = np.split(x.astype(np.float32), 2, axis=-1)
    with np.errstate(over="ignore"):
        if spec.activation == "silu":
            return gate / (1 + np.exp(-gate)) * up
    return 0.5 * gate * (1 + np.tanh(np.float32(0.7978845608) * (gate + 0.044715 * gate**3))) * up


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    a, b = np.split(x.astype(np.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
