"""What a task computes: arguments for a composite of so many rows, and what its result has to be, in numpy.

Free of TVM where weights are rows, as they are on GPUs: it runs in the process that measures, which needs no compiler.
Results are held to float32 on some of their rows and columns here, enough to find any mistake of a kernel; the others
are held to the default tile's, bit for bit (measuring.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tilewright.compiler.calls import Call
from tilewright.tuner.problem_base import Array, Composite, distance
from tilewright.tuner.problem_operator import Operator
from tilewright.tuner.problem_pages import Append, Attention, QKVAppend
from tilewright.tuner.problem_rows import Angles, Embedding, Gated, Linear, Norm, Rope
from tilewright.tuner.problem_sample import Sample


@dataclass(frozen=True)
class Problem:
    """A composite call to be measured. context: tokens in the cache of a sequence that decodes."""

    composite: str
    spec: Any
    rows: int
    inner: tuple[int, ...]
    decode: bool
    context: int

    @cached_property
    def _kind(self) -> "Composite":
        return _COMPOSITES[self.composite](self)

    def arguments(self) -> list[Array | int]:
        """The composite's arguments, the same in every process."""
        return self._kind.arguments(np.random.default_rng(0))

    def complaint(self, arguments: Sequence[Any], results: Sequence[Array]) -> str:
        """What is wrong with the results, "" where nothing is."""
        for compared in self._kind.compared(arguments, results):
            error = distance(compared.actual, compared.expected)
            if not error <= compared.most_error:
                return f"{compared.what} is off by {error:.2g}, more than {compared.most_error:g}"
        return ""

    @property
    def layer_argument(self) -> int | None:
        """The index of the layer among the arguments, where pages are."""
        return self._kind.layer_argument

    @property
    def layers(self) -> int:
        """Of the pages, 1 where there are none."""
        return self.spec.kv.layers if hasattr(self.spec, "kv") else 1

    @property
    def settled(self) -> tuple[int, ...]:
        """The results whose every bit a kernel has to settle, by their place."""
        return self._kind.settled

    @property
    def more_bytes(self) -> int:
        """What a call reads beyond its schedule's floor, which knows no positions."""
        return self._kind.more_bytes

    @property
    def more_operations(self) -> int:
        return self._kind.more_operations


def problem_of(call: Call, context: int) -> Problem | str:
    """The problem of a call, or why there is none."""
    if call.composite not in _COMPOSITES:
        return f"nothing here knows what {call.composite} computes"
    return Problem(call.composite, call.spec, call.rows, call.inner, call.decode, context)


def with_layer(arguments: Sequence[Any], problem: Problem, layer: int) -> list[Any]:
    """The arguments with another layer in them."""
    return [layer if i == problem.layer_argument else a for i, a in enumerate(arguments)]


_COMPOSITES: dict[str, Callable[[Problem], Composite]] = {
    "linear": Linear,
    "rms_norm": Norm,
    "gated": Gated,
    "rope": Rope,
    "angles": Angles,
    "embedding": Embedding,
    "kv_append": Append,
    "qkv_append": QKVAppend,
    "paged_attention": Attention,
    "sample": Sample,
    "generic": Operator,
}
