"""The clients of a soak (soak.py): good ones, and all kinds of bad ones, which must not harm them.

A client asks again and again until the time is over, each time as another kind that it draws. What a server may do to
whom is checked here: an accepted request that is read on ends with a reason or an error event.
"""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

WORDS = ["the", "river", "mountain", "compiler", "page", "of", "under", "quick", "slow", "green", "tree", "over"]
PATIENCE_S = 900.0  # a request waits for the others before it, and the server cuts its answer after 600 s
BUFFER = 4096  # bytes that a slow reader's socket takes
PAUSE_S = 10.0  # of a reader that is stuck: for buffers to fill, and longer than the server waits for it then


@dataclass
class Tally:
    """What was sent, by kind, and what came of it. wrong: what must not have happened, in words."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    cut_off: int = 0
    wrong: list[str] = field(default_factory=list)


class Client:
    """One of many. context: tokens that the model reads. answer: tokens of a long answer."""

    def __init__(self, port: int, context: int, answer: int, tally: Tally, seed: int) -> None:
        self._port, self._context, self._answer, self._tally = port, context, answer, tally
        self._rng = random.Random(seed)
        self._loop = asyncio.get_running_loop()

    async def run(self, until_s: float) -> None:
        names, weights = zip(*((kind.__name__, weight) for kind, weight in KINDS.items()), strict=True)
        while time.monotonic() < until_s:
            name = self._rng.choices(names, weights)[0]
            self._tally.sent[name] += 1
            try:
                await asyncio.wait_for(getattr(self, name)(), PATIENCE_S)
            except asyncio.TimeoutError:
                self._tally.wrong.append(f"{name}: no end after {PATIENCE_S:g} s")
            except OSError as error:
                self._tally.wrong.append(f"{name}: {error}")

    # -- those that read on --

    async def stream(self) -> None:
        with await self._asking(self._chat()) as connection:
            self._check_stream("stream", await self._rest(connection))

    async def text(self) -> None:
        body = {"model": "m", "prompt": self._words(30), "max_tokens": self._tokens(), "stream": True}
        with await self._asking(body, "/v1/completions") as connection:
            self._check_stream("text", await self._rest(connection))

    async def whole(self) -> None:
        with await self._asking(self._chat(stream=False)) as connection:
            head, body = _parts(await self._rest(connection))
        if self._accepted("whole", head):
            self._ended("whole", [choice["finish_reason"] for choice in json.loads(body)["choices"]])

    async def slow(self) -> None:
        """Reads as fast as a person."""
        said = b""
        with await self._asking(self._chat(), buffer=BUFFER) as connection:
            while piece := await self._loop.sock_recv(connection, 2000):
                said += piece
                await asyncio.sleep(0.02)
        self._check_stream("slow", said)

    async def stuck(self) -> None:
        """Does not read for so long that it is cut off, or finds all of it in buffers."""
        fields = {"logprobs": True, "top_logprobs": 20, "max_tokens": self._answer, "ignore_eos": True}
        with await self._asking(self._chat(**fields), buffer=BUFFER) as connection:
            said = b""
            while b'"top_logprobs"' not in said and (piece := await self._loop.sock_recv(connection, 1000)):
                said += piece  # until its turn has come
            await asyncio.sleep(PAUSE_S)
            with suppress(ConnectionResetError):
                said += await self._rest(connection)
        if _status(said) == "200" and b"[DONE]" not in said:
            self._tally.cut_off += 1
        else:
            self._check_stream("stuck", said)

    # -- those that leave --

    async def leave(self) -> None:
        await self._read_some()

    async def reset(self) -> None:
        await self._read_some(lambda c: c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)))

    async def half(self) -> None:
        """Closes its half: a client that says that it wants no more, which the server takes at its word."""
        with await self._asking(self._chat(max_tokens=self._answer)) as connection:
            await self._loop.sock_recv(connection, 500)
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                await self._rest(connection)

    async def torn(self) -> None:
        """Leaves in the middle of its request."""
        sent = _request("/v1/chat/completions", json.dumps(self._chat()).encode())
        with await self._connected() as connection:
            await self._loop.sock_sendall(connection, sent[: self._rng.randrange(1, len(sent))])

    # -- those that are refused --

    async def malformed(self) -> None:
        good = json.dumps(self._chat()).encode()
        path = "/v1/chat/completions"
        sent, status = self._rng.choice([
            (_request(path, good[: self._rng.randrange(len(good))]), "400"),
            (_request(path, self._rng.randbytes(200)), "400"),
            (_request(path, b'{"model": "m", "messages": 5}'), "400"),
            (_request(path, json.dumps(self._chat(temperature=-1)).encode()), "400"),
            (_request(path, json.dumps(self._chat(model="another")).encode()), "404"),
            (_request(path, good, "text/plain"), "415"),
            (_request("/v1/nowhere", good), "404"),
            (b"\x16\x03\x01" + self._rng.randbytes(50) + b"\r\n\r\n", "400"),
            (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", "431"),
        ])  # fmt: skip
        await self._refused("malformed", sent, status)

    async def oversized(self) -> None:
        words = self._words(self._context + 1) if self._rng.random() < 0.8 else "x" * (1 << 20)
        status = "400" if len(words) < 1 << 20 else "413"
        body = self._chat(messages=[{"role": "user", "content": words}])
        await self._refused("oversized", _request("/v1/chat/completions", json.dumps(body).encode()), status)

    # -- what they share --

    def _chat(self, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self._words(self._rng.randrange(1, 40))}]
        plain = {"model": "m", "messages": messages, "stream": True, "max_tokens": self._tokens()}
        return plain | {"temperature": self._rng.choice([0, 1])} | fields

    def _words(self, most: int) -> str:
        return " ".join(self._rng.choices(WORDS, k=most))

    def _tokens(self) -> int:
        return self._rng.randrange(1, self._answer // 4)

    async def _connected(self, buffer: int | None = None) -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await self._loop.sock_connect(connection, ("127.0.0.1", self._port))
        return connection

    async def _asking(
        self, body: dict[str, Any], path: str = "/v1/chat/completions", buffer: int | None = None
    ) -> socket.socket:
        connection = await self._connected(buffer)
        await self._loop.sock_sendall(connection, _request(path, json.dumps(body).encode()))
        return connection

    async def _rest(self, connection: socket.socket) -> bytes:
        said = b""
        while piece := await self._loop.sock_recv(connection, 1 << 16):
            said += piece
        return said

    async def _read_some(self, last: Callable[[socket.socket], None] = lambda _: None) -> None:
        left = self._rng.randrange(3000)
        with await self._asking(self._chat(max_tokens=self._answer)) as connection:
            while left > 0 and (piece := await self._loop.sock_recv(connection, left)):
                left -= len(piece)
            last(connection)

    async def _refused(self, kind: str, sent: bytes, status: str) -> None:
        with await self._connected() as connection:
            try:
                await self._loop.sock_sendall(connection, sent)
                said = await self._rest(connection)
            except (ConnectionResetError, BrokenPipeError):
                said = b""
        got = _status(said)
        self._tally.statuses[got] += 1
        if got != status and got != "none":  # none: it closed while we were sending what it had refused
            self._tally.wrong.append(f"{kind}: {got} instead of {status}: {said[-200:]!r}")

    def _accepted(self, kind: str, head: bytes) -> bool:
        status = _status(head)
        self._tally.statuses[status] += 1
        if status not in ("200", "429"):
            self._tally.wrong.append(f"{kind}: {head[:200]!r}")
        return status == "200"

    def _check_stream(self, kind: str, said: bytes) -> None:
        """An accepted stream ends with a reason and [DONE], or with an error event."""
        head, body = _parts(said)
        if not self._accepted(kind, head):
            return
        events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
        chunks = [json.loads(event) for event in events if event != b"[DONE]"]
        if chunks and "error" in chunks[-1]:
            self._ended(kind, ["error"])
            return
        reasons = [r for chunk in chunks for c in chunk["choices"] if (r := c["finish_reason"])]
        if events[-1:] != [b"[DONE]"]:
            self._tally.wrong.append(f"{kind}: a stream broke off: {said[-200:]!r}")
            return
        self._ended(kind, reasons)

    def _ended(self, kind: str, reasons: list[str]) -> None:
        if len(reasons) != 1 or reasons[0] not in ("stop", "length", "error"):
            self._tally.wrong.append(f"{kind}: it ends with {reasons}")
        self._tally.reasons.update(reasons)


def _request(path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"Host: a\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}"
    return f"POST {path} HTTP/1.1\r\n{head}\r\n\r\n".encode() + body


def _parts(said: bytes) -> tuple[bytes, bytes]:
    head, _, body = said.partition(b"\r\n\r\n")
    return head, body


def _status(said: bytes) -> str:
    words = said.split(b" ", 2)
    return words[1].decode() if len(words) > 1 else "none"


Kind = Callable[[Client], Awaitable[None]]
KINDS: dict[Kind, int] = {
    Client.stream: 36, Client.text: 10, Client.whole: 8, Client.slow: 8, Client.stuck: 3, Client.leave: 10,
    Client.reset: 6, Client.half: 5, Client.torn: 4, Client.malformed: 6, Client.oversized: 4,
}  # fmt: skip
