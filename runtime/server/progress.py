"""Whether an engine gets on: the ground that /health stands on."""

import time
from collections.abc import Callable

from tilewright.runtime.server.served import Served


class Progress:
    """Looked at often, it knows for how long an engine with work has finished no step."""

    def __init__(self, served: Served, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._served, self._stall_s, self._clock = served, stall_s, clock
        self._steps, self._since_s = -1, clock()

    @property
    def stalled(self) -> bool:
        self.look()
        return self._clock() - self._since_s > self._stall_s

    def look(self) -> None:
        """Notes a step, or that there is nothing to do."""
        engine = self._served.engine
        steps = engine.stats.steps
        if steps != self._steps or not engine.busy:
            self._steps, self._since_s = steps, self._clock()
