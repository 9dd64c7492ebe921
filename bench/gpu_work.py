"""What is common to the workloads of kernels: variants that run on the same numbers, and how far one may be off."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SPREAD_BYTES = 200e6  # memory that calls in turn read: several times the cache
CLOSE = 6e-3  # of results rounded to bfloat16, whose own rounding makes 1.7e-3; a wrong one is off by far more

Call = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """One engine's way to do it. calls: the work, each on memory of its own. error: of what calls[0] left, NaN where it
    left a NaN. apart: work that is not part of a call, done once a step, if there is some to be timed."""

    engine: str
    calls: Sequence[Call]
    error: Callable[[], float]
    most_error: float = CLOSE
    apart: Call | None = None


@dataclass(frozen=True)
class Work:
    """size_bytes, operations: that no implementation can do without."""

    variants: list[Variant]
    size_bytes: int
    operations: int


def installed(package: str) -> bool:
    """Whether a peer is there. One that is and can't be imported is an error."""
    return importlib.util.find_spec(package) is not None


def copies(each_bytes: int) -> int:
    """Copies of what a call reads that together don't fit into the cache."""
    return max(2, -(-int(SPREAD_BYTES) // each_bytes))


def distance(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """The larger of: the norm of the difference by the reference's; its largest entry by that of the reference."""
    difference = actual.float() - reference
    return max(
        (difference.norm() / reference.norm()).item(),
        (difference.abs().max() / reference.abs().max()).item(),
        key=lambda x: (x != x, x),
    )
