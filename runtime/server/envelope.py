"""What every HTTP request passes on its way in and out: an id, its key, a line in the log, a count."""

import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tilewright.runtime.server.errors import ApiError, as_api_error
from tilewright.runtime.server.keys import Key
from tilewright.runtime.server.logs import log
from tilewright.runtime.server.service import Service
from tilewright.runtime.server.tracing import OPERATIONS

_GIVEN_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")


@dataclass
class Call:
    """One HTTP request. id: ours, or the one that the client gave. notes: what its line in the log says beside."""

    id: str
    key: Key
    notes: dict[str, Any] = field(default_factory=dict)


class Envelope:
    """ASGI middleware around all routes. open_paths: those that need no key."""

    def __init__(self, app: ASGIApp, service: Service, open_paths: frozenset[str], paths: frozenset[str]) -> None:
        self._app, self._service = app, service
        self._open_paths, self._paths = open_paths, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a websocket, which no path here takes
            return
        started_s, status = time.perf_counter(), 499  # nginx's number for a client that left before its answer
        identity = _request_id(scope)

        async def sealed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
            await send(message)

        call = None
        try:
            try:
                call = scope.setdefault("state", {})["call"] = self._admit(scope, identity)
                await self._app(scope, receive, sealed)
            except ApiError as refusal:
                await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, sealed)
        except ClientDisconnect:
            pass
        except Exception as bug:
            # What has begun can't be taken back; the connection ends without its last chunk, which tells the client.
            logging.getLogger("tilewright.server").exception("a bug", extra={"fields": {"id": identity}})
            if status != 499:
                if call is not None:
                    call.notes["failed"] = "bug"
                raise
            answer = as_api_error(bug)
            await JSONResponse(answer.body, answer.status)(scope, receive, sealed)
        finally:
            self._note(scope, identity, call, status, time.perf_counter() - started_s)

    def _admit(self, scope: Scope, identity: str) -> Call:
        """Raises ApiError where the headers are too long, the key is missing, or has asked too often."""
        headers = dict(scope["headers"])
        limit = self._service.limits.max_header_bytes
        if (
            sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > limit
        ):  # h11 looks while some are missing
            raise ApiError(
                431, f"the headers are longer than {limit} bytes, the most that is allowed", code="invalid_http"
            )
        if scope["path"] in self._open_paths:
            return Call(identity, self._service.keys.nobody)
        key = self._service.keys.find(headers.get(b"authorization", b"").decode("latin-1"))
        key.admit_request()
        return Call(identity, key)

    def _note(self, scope: Scope, identity: str, call: Call | None, status: int, took_s: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"  # a label has few values
        self._service.metrics.http.labels(path, str(status)).inc()
        tracer = self._service.tracer
        if tracer is not None and path in OPERATIONS:
            now_ns = time.time_ns()
            parent = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), None)
            tracer.record(path, status, parent, now_ns - int(took_s * 1e9), now_ns, call.notes if call else {})
        if scope["path"] in self._open_paths and status == 200:
            return  # probes come every few seconds
        notes = {} if call is None else {"key": call.key.name, **call.notes}
        log("request", id=identity, method=scope["method"], path=path, status=status, s=round(took_s, 4), **notes)


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _GIVEN_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
