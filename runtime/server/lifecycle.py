"""A server's life: a socket, an event loop, the watch over the engines, and an end in order.

SIGTERM or SIGINT drains: /ready turns red, new requests get 503, those that run may finish until the grace is over and
are then cut with finish_reason "length" and stop_reason "shutdown"; the process ends with 0. A second signal cuts at
once. An engine that fails turns /health red, ends its streams with an error event, and the process with 1: whoever
started it starts it again. Models that may be opened again (restarts.py) get a new engine instead,
a few times a minute.
"""

import asyncio
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from tilewright.compiler.errors import UserError
from tilewright.runtime.server.http_protocol import bounded
from tilewright.runtime.server.logs import log
from tilewright.runtime.server.restarts import Restarts
from tilewright.runtime.server.service import Service

EXIT_DRAINED, EXIT_ENGINE_DEAD = 0, 1

_LOOK_S = 0.05
_FAREWELL_S = 1.0  # for error events to reach their readers
_CLOSER = "tilewright-close"  # threads that close engines
_CLOSING_S = 2.0  # for engines' threads, and for connections that are being closed


@dataclass(frozen=True)
class Tls:
    """Files in PEM form."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Raises UserError where they are of no use."""
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or error.strerror or error
            raise UserError(
                f"TLS can't use {self.certificate} with {self.key} ({reason}); give a certificate and its key, as PEM"
            ) from None


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet. port 0 is any that is free. Raises UserError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{host} port {port} can't be listened at ({reason}); choose another with --port or --host"
        ) from None
    return bound


class Server:
    """Serves an app at an address, until it is told to end or an engine fails."""

    def __init__(self, app: Starlette, service: Service, bound: socket.socket, tls: Tls | None = None) -> None:
        self._service, self._bound = service, bound
        self._restarts = Restarts()
        self._http = _Http(_config(app, service, tls))
        bound.listen(self._http.config.backlog)  # who connects from here on is answered once it runs

    def end(self) -> None:
        """What a signal does, for other threads: the first call drains, the second cuts."""
        self._http.signals += 1

    def run(self) -> int:
        """Serves, and closes the engines. Returns the process's exit code."""
        code = asyncio.run(self._live())
        self._service.close()
        if not _closed(self._service):
            log("an engine does not come to rest", logging.ERROR)
            return EXIT_ENGINE_DEAD
        return code

    async def _live(self) -> int:
        serving = asyncio.create_task(self._http.serve(sockets=[self._bound]))
        code = EXIT_DRAINED
        while not serving.done():
            await asyncio.sleep(_LOOK_S)
            for progress in self._service.progress:
                progress.look()
            if self._service.health == "dead":
                if await self._revived():
                    continue
                code = EXIT_ENGINE_DEAD
                await self._give_up()
            elif self._http.signals:
                await self._drain()
            else:
                continue
            self._http.should_exit = True
            await serving
        return code

    async def _drain(self) -> None:
        service, signals = self._service, self._http.signals
        service.draining = True
        log("draining", running=len(service.active), grace_s=service.limits.drain_s)
        await _until(lambda: not service.active or self._http.signals > signals, service.limits.drain_s)
        for generation in list(service.active):
            generation.cut("shutdown")
        await _until(lambda: not service.active, _CLOSING_S)

    async def _revived(self) -> bool:
        """Whether every dead engine has a successor."""
        dead = [served for served in self._service.models if served.engine.failure is not None]
        for served in dead:
            log("engine failed", logging.ERROR, model=served.name, reason=str(served.engine.failure))
            if not await self._restarts.revive(served):
                return False
        return True

    async def _give_up(self) -> None:
        await _until(lambda: not self._service.active, _FAREWELL_S)


def leave(code: int) -> None:
    """Ends the process: at once where a thread hangs in a device, which would hold up an exit in order."""
    if any(thread.name == _CLOSER and thread.is_alive() for thread in threading.enumerate()):
        os._exit(code)


def _config(app: Starlette, service: Service, tls: Tls | None) -> uvicorn.Config:
    limits = service.limits
    return uvicorn.Config(
        app,
        http=bounded(limits),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(limits.idle_s)),
        timeout_graceful_shutdown=round(_CLOSING_S),
        h11_max_incomplete_event_size=limits.max_header_bytes,
        ssl_certfile=str(tls.certificate) if tls else None,
        ssl_keyfile=str(tls.key) if tls else None,
    )


class _Http(uvicorn.Server):
    """uvicorn's server, which tells of signals instead of ending at once."""

    signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1


async def _until(done: Callable[[], bool], most_s: float) -> None:
    end = asyncio.get_running_loop().time() + most_s
    while not done() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(_LOOK_S)


def _closed(service: Service) -> bool:
    """Closes all engines; says whether they came to rest."""
    engines: Sequence[Callable[[], None]] = [served.engine.close for served in service.models]
    threads = [threading.Thread(target=close, name=_CLOSER, daemon=True) for close in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_CLOSING_S)
    return not any(thread.is_alive() for thread in threads)
