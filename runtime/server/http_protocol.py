"""uvicorn's HTTP/1.1 protocol with time limits for slow senders and slow readers, and errors as JSON.

A request's handler can't see these: they are about bytes that do not come, or do not go.
"""

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tilewright.runtime.server.errors import ApiError, unavailable
from tilewright.runtime.server.limits import ServerLimits
from tilewright.runtime.server.outlet import Outlet


class _Connection(h11.Connection):
    """h11 without its state machine for the pieces of a chunked body: a server of streams sends little else, and half
    of a piece's time in HTTP went there."""

    _chunked = False

    def framed(self, data: bytes) -> bytes:
        """A piece of a body that has begun."""
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        return super().send(h11.Data(data=data)) or b""

    def send(self, event: Any) -> bytes | None:  # type: ignore[override]
        if type(event) is h11.Data:
            return self.framed(bytes(event.data))
        sent = super().send(event)
        self._chunked = type(event) is h11.Response and b"transfer-encoding: chunked" in (sent or b"").lower()
        return sent


class BoundedProtocol(H11Protocol):
    """Ends connections that hold a socket without use. Subclassed with the limits of a server, see `bounded`."""

    limits: ServerLimits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self.conn = _Connection(h11.SERVER, self.limits.max_header_bytes)
        self._outlet = Outlet(transport, self.conn.framed, self.limits.max_unread_bytes)
        self.app_state = {**self.app_state, "outlet": self._outlet}
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            most = self.limits.max_connections
            self._refuse(unavailable(f"{most} connections are open, the most that are allowed", "too_many_connections"))
            return
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._header_timer)
        self._stop(self._send_timer)
        self._outlet.close()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and self._header_timer is None:
            self._await_header()  # the beginning of a next request
        elif self.conn.their_state is not h11.IDLE:
            self._stop(self._header_timer)
            self._header_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._outlet.pause()
        self._send_timer = self.loop.call_later(self.limits.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop(self._send_timer)
        super().resume_writing()
        self._outlet.resume()

    def send_400_response(self, msg: str) -> None:
        """Called where h11 refuses what came, with its exception at hand."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        words = str(error) if error is not None else msg
        if status == 431:
            words = f"the request's line and headers are longer than {self.limits.max_header_bytes} bytes"
        self._refuse(ApiError(status, words, code="invalid_http"))

    def _await_header(self) -> None:
        self._header_timer = self.loop.call_later(self.limits.header_s, self.transport.abort)

    def _refuse(self, error: ApiError) -> None:
        """Answers outside of any request, and ends the connection."""
        body = json.dumps(error.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is on its way already
            response: list[Any] = [
                h11.Response(status_code=error.status, headers=list((headers | dict(error.headers or {})).items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ]
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in response))
        self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def bounded(limits: ServerLimits) -> type[BoundedProtocol]:
    """The protocol with these limits: uvicorn makes its instances itself."""
    return type("Protocol", (BoundedProtocol,), {"limits": limits})
