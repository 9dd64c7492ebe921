"""The thread that turns the loop, and the post that brings events from it to event loops."""

import asyncio
import threading
import weakref
from collections import deque
from typing import Any

from tilewright.runtime.core import EngineCore
from tilewright.runtime.types import EngineError


class ServingThread:
    """Turns `core` while there is work, sleeps while there is none. Started with the first work."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._work = threading.Event()
        self._lock = threading.Lock()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Call after every submission and cancellation."""
        with self._lock:
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._serve, name="tilewright-engine", daemon=True)
                self._thread.start()
        self._work.set()

    def stop(self) -> None:
        """Ends what is unfinished with "error" and waits for the step that runs."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        self._work.set()
        if thread is None:
            self._core.fail(EngineError("it was closed"))
        elif thread is not threading.current_thread():
            thread.join()

    def _serve(self) -> None:
        try:
            while not self._stopping:
                if self._core.busy:
                    self._core.turn()
                    continue
                self._work.clear()
                if not self._core.busy and not self._stopping:
                    self._work.wait()
        except BaseException:
            return  # the core has told every request, and keeps the reason in `failure`
        self._core.fail(EngineError("it was closed"))


class LoopPost:
    """Brings items from another thread into one event loop's queues, waking the loop once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._called = False

    def put(self, queue: "asyncio.Queue[Any]", item: Any) -> bool:
        """From any thread. False where the loop is closed, so that nobody can read it any more."""
        self._items.append((queue, item))
        if self._called:
            return True
        self._called = True
        try:
            loop = self._loop()
            if loop is not None:
                loop.call_soon_threadsafe(self._deliver)
                return True
        except RuntimeError:  # closed since
            pass
        self._called = False
        return False

    def _deliver(self) -> None:
        self._called = False  # before the items are taken: what is put from here on calls again
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)
