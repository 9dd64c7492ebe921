"""Fair between tenants: of those that wait, the tenant that was served least goes first.

Virtual token counters (Sheng et al. 2024, "Fairness in serving large language models"): a tenant's counter grows by the
tokens it was served (scheduler/counters.py keeps them), and the next one admitted is of the tenant with the least. A
place never stays free for fairness' sake, and a tenant that asked for nothing has saved nothing up. Priorities come
first, those that were preempted next, and one tenant's own requests go in the order in which they came. All else is
FCFS: with one tenant the two are the same.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from tilewright.runtime.scheduler.counters import PROMPT_WEIGHT
from tilewright.runtime.scheduler.fcfs import FCFS
from tilewright.runtime.scheduler.policy import C, View


@dataclass(frozen=True)
class FairShare(FCFS):
    def order(self, view: View[C]) -> Iterable[C]:
        for _, equals in groupby(view.waiting, key=lambda c: c.rank[0]):
            queues: dict[str, deque[C]] = {}
            for candidate in equals:
                if candidate.begun:
                    yield candidate
                else:
                    queues.setdefault(candidate.tenant, deque()).append(candidate)
            yield from _least_served_first(queues, view)


def _least_served_first(queues: dict[str, deque[C]], view: View[C]) -> Iterator[C]:
    """Of all queues, as if each prompt were served once it has its turn."""
    turns = [(view.served.get(tenant, 0.0), queue[0].rank, tenant) for tenant, queue in queues.items()]
    heapq.heapify(turns)
    while turns:
        served, _, tenant = heapq.heappop(turns)
        candidate = queues[tenant].popleft()
        yield candidate
        if queues[tenant]:
            served += PROMPT_WEIGHT * candidate.length
            heapq.heappush(turns, (served, queues[tenant][0].rank, tenant))
