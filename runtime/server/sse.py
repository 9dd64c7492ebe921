"""Answers as server-sent events: a JSON text an event, an error's body where the engine fails, [DONE] at the end."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from tilewright.runtime.server.errors import as_api_error
from tilewright.runtime.server.generation import Generation
from tilewright.runtime.types import EngineError

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
]

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes one each time


class EventStreamResponse:
    """An ASGI response that owns its generation: however it ends, nothing of it goes on."""

    def __init__(self, generation: Generation, chunks: AsyncIterator[Mapping[str, Any]], named: bool = False) -> None:
        """named: events carry their type as a name, and the last of them says that it is the last."""
        self._generation, self._chunks, self._named = generation, chunks, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation:
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            try:
                async for chunk in self._chunks:
                    name = f"event: {chunk['type']}\n".encode() if self._named else b""
                    await send(_body(name + _event(chunk)))
            except EngineError as error:
                await send(_body(_event(as_api_error(error).body)))
            else:
                if not self._named:
                    await send(_body(b"data: [DONE]\n\n"))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


def _event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + _encode(chunk).encode() + b"\n\n"
