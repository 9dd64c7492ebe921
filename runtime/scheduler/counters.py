"""How much each tenant was served: the virtual token counters of scheduler/fair.py (Sheng et al. 2024).

Kept by the core, read by policies. A counter only ever grows, by what its tenant is served, and to the least of those
that wait when its tenant comes back: time without requests is no credit.
"""

from collections.abc import Iterable

# A token of an answer takes a whole pass over the cache, one of a prompt shares its pass; the weights are the paper's.
PROMPT_WEIGHT, ANSWER_WEIGHT = 1.0, 2.0


class VirtualCounters:
    """served: by tenant, weighted tokens since the start."""

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._last_left = ""

    def arrive(self, tenant: str, waiting: Iterable[str]) -> None:
        """A request of `tenant` comes to those of `waiting`, the tenants that have one waiting."""
        others = set(waiting)
        if tenant in others:
            return
        floor = min((self._of(other) for other in others), default=self._of(self._last_left))
        self.served[tenant] = max(self._of(tenant), floor)

    def admit(self, tenant: str, prompt_tokens: int) -> None:
        """A request of `tenant` has its turn, and so many tokens of its prompt will be computed."""
        self._last_left = tenant
        self.served[tenant] = self._of(tenant) + PROMPT_WEIGHT * prompt_tokens

    def answer(self, tenant: str, tokens: int) -> None:
        self.served[tenant] = self._of(tenant) + ANSWER_WEIGHT * tokens

    def _of(self, tenant: str) -> float:
        return self.served.get(tenant, 0.0)
