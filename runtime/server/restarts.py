"""A dead engine's successor in the same process: for models on a CPU, where a failure leaves the process whole.

On a GPU the error may have taken the CUDA context with it, and no new engine can be made in that process: there a
supervisor starts another one. Restarts are limited, since what fails again and again is not mended by them.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from tilewright.runtime.server.logs import log
from tilewright.runtime.server.served import Served

MOST_RESTARTS, WINDOW_S = 3, 60.0


class Restarts:
    """Starts engines again, MOST_RESTARTS times within WINDOW_S at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque()

    async def revive(self, served: Served) -> bool:
        """Replaces the engine by a new one; False where that can't or may not be done. The server answers meanwhile,
        and its /health stays red until the new engine is in place."""
        now_s = self._clock()
        while self._times and now_s - self._times[0] > WINDOW_S:
            self._times.popleft()
        if served.reopen is None or len(self._times) >= MOST_RESTARTS:
            return False
        self._times.append(now_s)
        dead = served.engine
        try:
            served.engine = await asyncio.to_thread(served.reopen)
        except Exception as error:  # whatever it is, there is no engine, and the process ends
            log("engine not restarted", logging.ERROR, model=served.name, reason=str(error))
            return False
        await asyncio.to_thread(dead.close)
        served.restarts += 1
        log("engine restarted", logging.WARNING, model=served.name, s=round(self._clock() - now_s, 3))
        return True
