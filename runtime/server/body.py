"""A request's body: read within its limits, and checked against its model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request

from tilewright.runtime.server.errors import ApiError
from tilewright.runtime.server.limits import ServerLimits
from tilewright.runtime.server.requests import Body

B = TypeVar("B", bound=Body)

# The connection ends with the answer to a body that is refused, and little more of it is read before.
_CLOSE = {"connection": "close"}
_LINGER_S, _LINGER_BODIES = 0.5, 4


async def read(request: Request, model: type[B], limits: ServerLimits) -> B:
    """The body as a `model`. Raises ApiError: 400, 408, 413, 415; pydantic's ValidationError, which becomes 400."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A form on somebody's web page can't send this type, so that no page speaks for its reader unasked.
        raise ApiError(
            415, f"the content type is {kind[:64] or 'not given'}; send application/json", code="unsupported_media_type"
        )
    try:
        raw = await asyncio.wait_for(_read(request, limits), limits.body_s)
    except asyncio.TimeoutError:
        message = f"the body did not come within {limits.body_s:g} s; send it faster"
        raise ApiError(408, message, code="body_timeout", headers=_CLOSE) from None
    return model.model_validate_json(raw)


async def _read(request: Request, limits: ServerLimits) -> bytes:
    most = limits.max_body_bytes
    announced = request.headers.get("content-length", "0")
    body, chunks = bytearray(), request.stream()
    if int(announced) <= most:  # h11 has made sure that it is a number
        async for chunk in chunks:
            body += chunk
            if len(body) > most:
                break
        else:
            return bytes(body)
    if "expect" not in request.headers:  # such a client asks before it sends
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(chunks, most), min(_LINGER_S, limits.body_s / 2))
    raise ApiError(
        413, f"the body is longer than {most} bytes, the most that is allowed", code="body_too_large", headers=_CLOSE
    )


async def _discard(chunks: AsyncIterator[bytes], most: int) -> None:
    """Reads on: a client that is cut off while it sends may never see the answer."""
    read = 0
    async for chunk in chunks:
        read += len(chunk)
        if read > _LINGER_BODIES * most:
            return
