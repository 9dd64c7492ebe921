"""Answers as server-sent events: a JSON text an event, an error's body where the engine fails, [DONE] at the end.

An event is written where the engine's news of it arrive, without a task's turn; most events of a stream differ in one
text, so the JSON around it is made once.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from tilewright.runtime.server.errors import as_api_error
from tilewright.runtime.server.generation import Generation
from tilewright.runtime.server.outlet import Outlet
from tilewright.runtime.types import EngineError, StreamEvent

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
]

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes one each time


class Frame:
    """An event in JSON that was made once, around a text that changes. chunk: what it looks like with the text HOLE,
    which comes after whatever else in it may say the same."""

    HOLE = "\0"

    def __init__(self, chunk: Mapping[str, Any]) -> None:
        before, _, after = _encode(chunk).rpartition(_encode(self.HOLE))
        self._before, self._after = f"data: {before}", f"{after}\n\n"

    def around(self, text: str) -> bytes:
        return (self._before + _encode(text) + self._after).encode()


Chunk = Mapping[str, Any] | bytes  # bytes: of a Frame


class Streamed(Protocol):
    """An answer as it grows."""

    def begin(self) -> Iterable[Chunk]: ...

    def grow(self, choice: int, event: StreamEvent) -> Iterable[Chunk]: ...

    def end(self) -> Iterable[Chunk]: ...


class EventStreamResponse:
    """An ASGI response that owns its generation: however it ends, nothing of it goes on."""

    def __init__(self, generation: Generation, answer: Streamed, named: bool = False) -> None:
        """named: events carry their type as a name, and the last of them says that it is the last."""
        self._generation, self._answer, self._named = generation, answer, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outlet: Outlet = scope["state"]["outlet"]
        answer = self._answer

        def write(chunks: Iterable[Chunk]) -> None:
            if data := b"".join(map(self._event, chunks)):
                outlet.write(data)

        async with self._generation:
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            write(answer.begin())
            try:
                await self._generation.listen(lambda choice, event: write(answer.grow(choice, event)))
            except EngineError as error:
                failure = as_api_error(error)
                self._generation.note_failure(failure)
                outlet.write(_event(failure.body))
            else:
                write(answer.end())
                if not self._named:
                    outlet.write(b"data: [DONE]\n\n")
            await outlet.drained()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _event(self, chunk: Chunk) -> bytes:
        if isinstance(chunk, bytes):
            return chunk
        name = f"event: {chunk['type']}\n".encode() if self._named else b""
        return name + _event(chunk)


def _event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + _encode(chunk).encode() + b"\n\n"
