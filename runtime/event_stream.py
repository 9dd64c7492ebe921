"""The events of requests on their way from the engine's thread to the event loop that waits for them."""

import asyncio
from collections.abc import Callable, Sequence

from tilewright.runtime.request import Request
from tilewright.runtime.serving_thread import LoopPost
from tilewright.runtime.types import StreamEvent

Listener = Callable[[int, StreamEvent], None]


class EventStream:
    """The events of all samples of all requests as (place of the request, event), up to the last one's completion:
    iterated over, or heard by a listener where they arrive, which spares a task's turn for each.

    cancel_requests: ends requests before the next step. checked: raises what a failed engine's event means. Whoever
    opened it calls `leave` at last.
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
        self._decisions: asyncio.Queue[int] = asyncio.Queue()
        self._listener: Listener | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unfinished = sum(len(request.samples) for request in requests)

    def decision(self) -> None:
        """Takes, on the engine's thread, that a request is queued or refused."""
        self._post.put(self, 0, None)

    def sender(self, place: int) -> Callable[[Request, StreamEvent], None]:
        """Takes the events of the request at `place` on the engine's thread."""
        return lambda _, event: self._post.put(self, place, event)

    def take(self, place: int, event: StreamEvent | None) -> None:
        """Takes what the post brings. event: None where a request is queued or refused."""
        if event is None:
            self._decisions.put_nowait(place)
        elif self._listener is None:
            self._events.put_nowait((place, event))
        else:
            self._tell(self._listener, place, event)

    async def decided(self) -> None:
        """Waits until every request is queued. Raises DeadlineError where one was refused instead."""
        for _ in self.requests:
            await self._decisions.get()
        for request in self.requests:
            if request.refusal is not None:
                raise request.refusal

    async def listen(self, listener: Listener) -> None:
        """Calls `listener` with every event, and returns after the last. Raises what it raises."""
        while not self._events.empty():
            self._tell(listener, *self._events.get_nowait())
        self._listener = listener
        await self._ended

    def cancel(self) -> None:
        """Ends what is unfinished; the events that say so still come."""
        self._cancel_requests(self.requests)

    def leave(self) -> None:
        """Ends what is unfinished, and tells the requests that nobody reads on."""
        self._listener = None
        self._cancel_requests(self.requests)
        for request in self.requests:
            request.leave()

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> tuple[int, StreamEvent]:
        if not self._unfinished:
            raise StopAsyncIteration
        place, event = await self._events.get()
        self._checked(event)
        self._unfinished -= event.completion is not None
        return place, event

    def _tell(self, listener: Listener, place: int, event: StreamEvent) -> None:
        if self._ended.done():  # by a failure, or its task was cancelled
            return
        try:
            self._checked(event)
            listener(place, event)
        except Exception as error:
            self._ended.set_exception(error)
            return
        self._unfinished -= event.completion is not None
        if not self._unfinished:
            self._ended.set_result(None)
