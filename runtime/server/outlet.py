"""The way out for streams: bytes go to the socket where they are made, and wait here while their reader is behind."""

import asyncio
from collections import deque
from collections.abc import Callable


class Outlet:
    """The bodies of one connection's answers, a piece at a time. Belongs to the event loop's thread.

    frame: a piece as HTTP has it. most_bytes: what may wait for a reader; one that is further behind is cut off.
    """

    def __init__(self, transport: asyncio.Transport, frame: Callable[[bytes], bytes], most_bytes: int) -> None:
        self._transport, self._frame, self._most_bytes = transport, frame, most_bytes
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._paused = False
        self._drained = asyncio.Event()
        self._drained.set()

    def write(self, piece: bytes) -> None:
        """Takes a piece of a body that has begun. A connection that is gone takes it as well."""
        if self._transport.is_closing():
            return
        if not self._paused:
            self._transport.write(self._frame(piece))
            return
        self._held.append(piece)
        self._held_bytes += len(piece)
        self._drained.clear()
        if self._held_bytes > self._most_bytes:
            self._transport.abort()

    async def drained(self) -> None:
        """Waits until nothing is held any more, for it is written or the connection is gone."""
        await self._drained.wait()

    def pause(self) -> None:
        """Called where the transport has enough."""
        self._paused = True

    def resume(self) -> None:
        """Called where the transport takes more."""
        self._paused = False
        while self._held and not self._paused:  # to write may pause again
            piece = self._held.popleft()
            self._held_bytes -= len(piece)
            self._transport.write(self._frame(piece))
        if not self._held:
            self._drained.set()

    def close(self) -> None:
        """Called where the connection is gone."""
        self._held.clear()
        self._held_bytes = 0
        self._drained.set()
