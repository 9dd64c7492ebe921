"""A client of many streams that costs little, in a process of its own: reads a JSON request, prints JSON figures.

{"port", "bodies": [...]} -> {"seconds", "tokens", "texts": [...], "first_ms": [a stream], "between_ms": [a token]}

While streams run it notes bytes and when they came, and no more, so that it leaves the cores to the server; what the
bytes say is read when the last stream has ended.
"""

import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

_END = "[DONE]"
_SILENCE_S = 120.0
_PIECE = 1 << 16


@dataclass
class Stream:
    """One request and what came back: (when, bytes) of every read."""

    connection: socket.socket
    begun_s: float
    reads: list[tuple[float, bytes]] = field(default_factory=list)


@dataclass
class Said:
    """An answer, and when each piece of its text came."""

    begun_s: float
    times: list[float]
    text: str
    tokens: int


def run(asked: dict[str, Any]) -> dict[str, Any]:
    begun_s = time.perf_counter()
    streams = [begin(asked["port"], json.dumps(body).encode()) for body in asked["bodies"]]
    collect(streams)
    seconds = time.perf_counter() - begun_s
    answers = [read(stream) for stream in streams]
    return {
        "seconds": seconds,
        "first_ms": [1e3 * (said.times[0] - said.begun_s) for said in answers],
        "between_ms": between_ms([said.times for said in answers]),
        "tokens": sum(said.tokens for said in answers),
        "texts": [said.text for said in answers],
    }


def begin(port: int, body: bytes) -> Stream:
    connection = socket.create_connection(("127.0.0.1", port))
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{kind}\r\nConnection: close\r\n\r\n"
    begun_s = time.perf_counter()
    connection.sendall(head.encode() + body)
    connection.setblocking(False)
    return Stream(connection, begun_s)


def collect(streams: Sequence[Stream]) -> None:
    """Reads until every server's end is closed."""
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.connection, selectors.EVENT_READ, stream)
        while selector.get_map():
            ready = selector.select(_SILENCE_S)
            if not ready:
                raise SystemExit(f"no stream said anything for {_SILENCE_S:g} s")
            for key, _ in ready:
                piece = key.data.connection.recv(_PIECE)
                if piece:
                    key.data.reads.append((time.perf_counter(), piece))
                else:
                    selector.unregister(key.data.connection)
                    key.data.connection.close()


def read(stream: Stream) -> Said:
    """What a stream said. SystemExit where it is no whole answer."""
    times, texts, tokens, ended = [], [], 0, False
    for at_s, event in events(stream.reads):
        if event == _END:
            ended = True
            continue
        chunk = json.loads(event)
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        for choice in chunk.get("choices", ()):
            if text := choice["delta"].get("content"):
                times.append(at_s)
                texts.append(text)
    if not ended:
        raise SystemExit(f"a stream broke off: {b''.join(piece for _, piece in stream.reads)[-300:]!r}")
    return Said(stream.begun_s, times, "".join(texts), tokens or len(times))


def events(reads: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """(when its last byte came, data) of every server-sent event."""
    said = b""
    for at_s, data in chunks(reads):
        said = (said + data).replace(b"\r\n", b"\n")
        *whole, said = said.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):
                yield at_s, event[len(b"data: ") :].decode()


def chunks(reads: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """(when its last byte came, bytes) of every chunk of a chunked HTTP answer."""
    buffer = b""
    in_body = False
    for at_s, piece in reads:
        buffer += piece
        if not in_body:
            head, mark, rest = buffer.partition(b"\r\n\r\n")
            if not mark:
                continue
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server refuses: {buffer[:500]!r}")
            buffer, in_body = rest, True
        while (chunk := _chunk(buffer)) is not None:
            data, buffer = chunk
            yield at_s, data


def _chunk(buffer: bytes) -> tuple[bytes, bytes] | None:
    """The first chunk and what follows it, or None where it is not whole."""
    line, mark, rest = buffer.partition(b"\r\n")
    size = int(line, 16) if mark else 0
    if not mark or len(rest) < size + 2:
        return None
    return rest[:size], rest[size + 2 :]


def between_ms(streams: Sequence[Sequence[float]]) -> list[float]:
    """Milliseconds from token to token while all streams run."""
    first, last = max(times[0] for times in streams), min(times[-1] for times in streams)
    return [1e3 * (b - a) for times in streams for a, b in pairwise(times) if first <= a and b <= last]


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
