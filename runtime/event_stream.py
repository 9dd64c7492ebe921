"""The events of requests on their way from the engine's thread to the event loop that waits for them."""

import asyncio
from collections.abc import Callable, Sequence

from tilewright.runtime.request import Request
from tilewright.runtime.serving_thread import LoopPost
from tilewright.runtime.types import StreamEvent


class EventStream:
    """Iterates over (place of the request, event) until every sample of every request has ended.

    cancel_requests: ends requests before the next step. checked: raises what a failed engine's event means. Whoever
    stops iterating before the end calls `cancel`.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        post: LoopPost,
        cancel_requests: Callable[[Sequence[Request]], None],
        checked: Callable[[StreamEvent], StreamEvent],
    ) -> None:
        self.requests = requests
        self._post = post
        self._cancel_requests, self._checked = cancel_requests, checked
        self._events: asyncio.Queue[tuple[int, StreamEvent]] = asyncio.Queue()
        self._decisions: asyncio.Queue[None] = asyncio.Queue()
        self._unfinished = sum(len(request.samples) for request in requests)

    def decision(self) -> None:
        """Takes, on the engine's thread, that a request is queued or refused."""
        self._post.put(self._decisions, None)

    def listener(self, place: int) -> Callable[[Request, StreamEvent], None]:
        """Takes the events of the request at `place` on the engine's thread. An event loop that is gone cancels it."""

        def deliver(request: Request, event: StreamEvent) -> None:
            if not self._post.put(self._events, (place, event)):
                self._cancel_requests([request])

        return deliver

    async def decided(self) -> None:
        """Waits until every request is queued. Raises DeadlineError where one was refused instead."""
        for _ in self.requests:
            await self._decisions.get()
        for request in self.requests:
            if request.refusal is not None:
                raise request.refusal

    def cancel(self) -> None:
        """Ends what is unfinished; the events that say so still come."""
        self._cancel_requests(self.requests)

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> tuple[int, StreamEvent]:
        if not self._unfinished:
            raise StopAsyncIteration
        place, event = await self._events.get()
        self._checked(event)
        self._unfinished -= event.completion is not None
        return place, event
