"""Checks over many shapes: `make test` runs those that are worst off, `make test-slow` the others."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def quick(first: Sequence[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases for pytest.mark.parametrize; those that are not among the first are marked slow."""
    return [case if case in first else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
