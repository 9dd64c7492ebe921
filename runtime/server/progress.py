"""Whether an engine gets on: the ground that /health stands on."""

import time
from collections.abc import Callable

from tilewright.runtime.engine import Engine


class Progress:
    """Looked at often, it knows for how long an engine with work has finished no step."""

    def __init__(self, engine: Engine, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._stall_s, self._clock = engine, stall_s, clock
        self._steps, self._since_s = -1, clock()

    @property
    def stalled(self) -> bool:
        self.look()
        return self._clock() - self._since_s > self._stall_s

    def look(self) -> None:
        """Notes a step, or that there is nothing to do."""
        steps = self._engine.stats.steps
        if steps != self._steps or not self._engine.busy:
            self._steps, self._since_s = steps, self._clock()
