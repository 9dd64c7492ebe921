"""Token buckets: so much a minute on average, so much at once at most (Turner 1986, "leaky bucket as a meter")."""

import math
import time
from collections.abc import Callable


class Bucket:
    """Holds up to `per_minute`, and fills at that rate. Takings may leave a debt, which is waited off first."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._updated_s = float(per_minute), clock()

    @property
    def level(self) -> float:
        now_s = self._clock()
        self._level = min(self.per_minute, self._level + (now_s - self._updated_s) * self.per_minute / 60)
        self._updated_s = now_s
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there: 0 where it is, infinite where it never will be."""
        if amount > self.per_minute:
            return math.inf
        return max(0.0, amount - self.level) * 60 / self.per_minute

    def take(self, amount: float) -> None:
        self._level = self.level - amount
