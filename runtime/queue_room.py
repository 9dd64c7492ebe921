"""Places for requests that wait for their first step, shared by tenants."""

import threading
from collections import Counter

from tilewright.compiler.errors import QueueFullError


class QueueRoom:
    """`most` places. Where all are taken, a tenant still gets in that has fewer than its part of them, so that one
    tenant's flood does not shut the door on others: with k tenants waiting there are at most about (1 + ln k) times as
    many requests. All methods may be called from any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()
        self._total = 0
        self._changed = threading.Condition()

    def enter(self, tenant: str, wait: bool) -> None:
        """Takes a place; where there is none, waits for one, or raises QueueFullError."""
        with self._changed:
            while not self._open(tenant):
                if not wait:
                    raise QueueFullError(
                        f"{self._total} requests are waiting, the most that max_queue allows; try again later"
                    )
                self._changed.wait()
            self._taken[tenant] += 1
            self._total += 1

    def leave(self, tenant: str) -> None:
        with self._changed:
            self._total -= 1
            self._taken[tenant] -= 1
            if not self._taken[tenant]:
                del self._taken[tenant]
            self._changed.notify_all()

    def _open(self, tenant: str) -> bool:
        if self._total < self._most:
            return True
        tenants = len(self._taken) + (tenant not in self._taken)
        return self._taken[tenant] < self._most // tenants
