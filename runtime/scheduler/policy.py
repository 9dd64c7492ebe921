"""What a scheduling policy is: a pure function from what it sees to the next step.

It sees views and returns a plan; it changes nothing, reads no clock and remembers nothing, so the same policy runs
before a device, before a fake one with a virtual clock, and in a search over policies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from tilewright.runtime.kv_cache import PageLedger, PageTable
from tilewright.runtime.types import Costs


class Candidate(Protocol):
    """A sequence as policies see it. Policies return the same objects and must not change them."""

    @property
    def rank(self) -> tuple[int, int, int]:
        """Seniority: smaller is more senior. (-priority, arrival, sample index); unique."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""

    @property
    def computed(self) -> int:
        """How many of them are in the cache; at least one is not. One left: the next is drawn from it (decode)."""

    @property
    def width(self) -> int:
        """Rows it takes when its prompt ends: n before the samples of a request part, then 1."""

    @property
    def table(self) -> PageTable: ...

    @property
    def tenant(self) -> str:
        """On whose behalf it runs. Opaque."""

    @property
    def begun(self) -> bool:
        """Whether it ran before: one that waits was preempted."""


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True)
class Budget:
    """The engine's limits, resolved against the device's. max_batch: sequences, and rows, a step. max_stretch: how many
    times longer prompts may make a step in which others decode (EngineLimits)."""

    max_batch: int
    max_tokens: int
    max_chunk: int
    max_stretch: float | None = None


@dataclass(frozen=True)
class View(Generic[C]):
    """All that a policy may look at. waiting holds no pages; both lists are in order of seniority.

    cached: the pages that are kept of a waiting one's beginning; its table may start with them. They are full, and at
    least one token is left to compute.
    served: by tenant, what it was served so far, weighted, in tokens (scheduler/counters.py); 0 where it is missing.
    costs: what steps take.
    ledger: a scratch copy of the page accounts, made for this view; booking in it changes nothing else.
    """

    waiting: Sequence[C]
    running: Sequence[C]
    ledger: PageLedger
    budget: Budget
    now_s: float
    costs: Costs | None = None
    cached: Callable[[C], Sequence[int]] = lambda _: ()
    served: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan(Generic[C]):
    """The next step: first `preempt` (running ones give up their pages and wait), then `admit`, then compute `chunks`.

    admit: (sequence, the kept pages that its table starts with; what they hold counts as computed).
    chunks: (sequence, tokens), each running after the above, at most once, 1 <= tokens <= length - computed. The sums
    of tokens and of widths stay within the budget, and the pages within the ledger. While anything is waiting or
    running, a plan computes at least one token.
    """

    preempt: Sequence[C]
    admit: Sequence[tuple[C, Sequence[int]]]
    chunks: Sequence[tuple[C, int]]


class Policy(Protocol):
    def plan(self, view: View[C]) -> Plan[C]: ...
