"""The thread that turns the loop, and the posts that bring events from it to event loops."""

import asyncio
import threading
import weakref
from typing import Protocol

from tilewright.runtime.core import EngineCore
from tilewright.runtime.types import EngineError, StreamEvent


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


class Reader(Protocol):
    """Who reads a request's events on an event loop."""

    def take(self, place: int, event: StreamEvent | None) -> None:
        """On the loop's thread; must not raise."""

    def cancel(self) -> None:
        """Where nobody can read any more. From any thread."""


Item = tuple[Reader, int, StreamEvent | None]


class Posts:
    """Brings events from the thread that turns a core to event loops: each loop is woken once for all that a step has
    for it, when the step's tokens are handed out, and not before, as the two threads would take turns then."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopPost] = weakref.WeakKeyDictionary()
        self._filled: list[LoopPost] = []

    def of(self, loop: asyncio.AbstractEventLoop) -> "LoopPost":
        """Call it on the loop's thread."""
        return self._of.setdefault(loop, LoopPost(loop, self._filled))

    def send(self) -> None:
        while self._filled:
            self._filled.pop().send()


class LoopPost:
    """What waits to be brought to one loop. filled: where it enters itself with the first item."""

    def __init__(self, loop: asyncio.AbstractEventLoop, filled: "list[LoopPost]") -> None:
        self._loop = weakref.ref(loop)
        self._filled = filled
        self._items: list[Item] = []

    def put(self, reader: Reader, place: int, event: StreamEvent | None) -> None:
        if not self._items:
            self._filled.append(self)
        self._items.append((reader, place, event))

    def send(self) -> None:
        items, self._items = self._items, []
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(_deliver, items)
                return
        except RuntimeError:  # closed since
            pass
        for reader in {reader for reader, _, _ in items}:
            reader.cancel()


def _deliver(items: list[Item]) -> None:
    for reader, place, event in items:
        reader.take(place, event)
