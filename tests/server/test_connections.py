"""Bytes that come slowly, wrongly or not at all, and readers that do not read: they end, the rest goes on."""

import json
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.serving import MESSAGES, MODEL, Running, post, receive_until, running, wait_until
from tilewright.runtime.server.limits import ServerLimits

pytestmark = pytest.mark.timeout(60)

LIMITS = ServerLimits(
    max_body_bytes=20_000, max_header_bytes=2048, max_connections=20, header_s=0.3, body_s=0.3, send_s=0.3
)


@pytest.fixture(scope="module")
def _shared() -> Iterator[Running]:
    with running(LIMITS) as it:
        yield it


def head_and_body(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: " + b"y" * 4000 + b"\r\n\r\n", 431, id="huge_header"
        ),
        pytest.param(b"GET /" + b"y" * 4000, 431, id="huge_line"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, id="tls_to_a_plain_port"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400, id="nul_in_a_header"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, id="no_host"),
        pytest.param(b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n", 400, id="negative_length"),
        pytest.param(
            b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            400,
            id="two_lengths",
        ),
        pytest.param(
            b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501, id="transfer_encoding"
        ),
    ],
)
def test_what_is_no_http(server: Running, sent: bytes, status: int) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        got, body = head_and_body(receive_until(connection, None))
    assert got == status and body["error"]["code"] == "invalid_http"


def test_bodies_over_the_limit(server: Running) -> None:
    announced = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    for rest in (b"Content-Length: 99999999999999999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(announced + rest)
            if b"chunked" in rest:
                for _ in range(30):
                    connection.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
                connection.sendall(b"0\r\n\r\n")
            answer = receive_until(connection, None)
        assert head_and_body(answer)[0] == 413 and b"connection: close" in answer.lower()


def test_slow_senders(server: Running) -> None:
    begun = time.monotonic()
    silent, header, body = server.connect(), server.connect(), server.connect()
    header.sendall(b"GET /health HTTP/1.1\r\nHo")
    body.sendall(post("/tokenize", b"x" * 100)[:-90])
    assert receive_until(silent, None) == receive_until(header, None) == b""
    status, answer = head_and_body(receive_until(body, None))
    assert status == 408 and answer["error"]["code"] == "body_timeout"
    assert time.monotonic() - begun < 3
    for connection in (silent, header, body):
        connection.close()


def test_a_reader_that_does_not_read_is_cut_off(server: Running) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", server.port))
    # So many alternatives a token that the answer is larger than all buffers on its way.
    fields = {"n": 8, "logprobs": True, "top_logprobs": 20, "stream": True, "ignore_eos": True}
    body = json.dumps({"model": MODEL, "messages": MESSAGES, **fields})
    connection.sendall(post("/v1/chat/completions", body.encode()))
    wait_until(lambda: server.service.active)
    wait_until(lambda: not server.service.active)
    connection.close()


@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_leaving_in_mid_stream_cancels(server: Running, how: str) -> None:
    server.model.step_s = 0.01
    before = server.engine.stats.drawn
    connection = server.open_stream(n=4)
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "half":
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.close()
    wait_until(lambda: not server.service.active)
    server.model.step_s = 0.0
    connection.close()
    assert server.engine.stats.drawn - before < 1200, "four answers of 500 tokens would have been 2000"


def test_leaving_before_an_answer_cancels(server: Running) -> None:
    server.model.gate.clear()
    connection = server.connect()
    body = json.dumps({"model": MODEL, "messages": MESSAGES, "ignore_eos": True})
    connection.sendall(post("/v1/chat/completions", body.encode()))
    wait_until(lambda: server.service.active)
    connection.close()
    server.model.step_s = 0.001
    server.model.gate.set()
    wait_until(lambda: not server.service.active)
    server.model.step_s = 0.0
    assert server.engine.stats.drawn < 10_000


def test_leaving_in_the_middle_of_a_body(server: Running) -> None:
    for _ in range(5):
        with server.connect() as connection:
            connection.sendall(post("/v1/chat/completions", b"{" * 500)[:-100])
    assert server.chat()[0] == 200


def test_requests_one_after_the_other_and_in_a_pipeline(server: Running) -> None:
    one = post("/tokenize", json.dumps({"model": MODEL, "prompt": "the dog"}).encode())
    with server.connect() as connection:
        for _ in range(3):
            connection.sendall(one)
            assert receive_until(connection, b'"tokens"').startswith(b"HTTP/1.1 200")
        connection.sendall(one * 3)
        received = b""
        while received.count(b'"tokens"') < 3:
            received += connection.recv(65536)


def test_more_connections_than_are_allowed(server: Running) -> None:
    held = [server.connect() for _ in range(LIMITS.max_connections)]
    answer = receive_until(server.connect(), None)
    assert head_and_body(answer)[0] == 503 and b"too_many_connections" in answer and b"retry-after" in answer.lower()
    for connection in held:
        connection.close()
    wait_until(lambda: server.ask("GET", "/health")[0] == 200)


def test_a_storm_leaves_nothing_behind(server: Running) -> None:
    """Streams that are read, left, reset and broken at random places, requests that are no requests, and good ones
    among them, which get their answers: no page, no task, no file descriptor is left."""
    rng = random.Random(5)
    good = server.chat(seed=3)[2]["choices"]
    server.rest()
    descriptors = _descriptors()
    server.model.step_s = 0.0005
    open_ones: list[socket.socket] = []
    stream = json.dumps({"model": MODEL, "messages": MESSAGES, "stream": True, "n": 2, "ignore_eos": True}).encode()
    for i in range(80):
        connection = server.connect()
        kind = rng.randrange(5)
        if kind == 0:
            connection.sendall(os.urandom(rng.randrange(1, 200)))
        elif kind == 1:
            whole = post("/v1/chat/completions", stream)
            connection.sendall(whole[: rng.randrange(1, len(whole))])
        else:
            connection.sendall(post("/v1/chat/completions", stream))
            if kind == 2:
                connection.recv(rng.randrange(1, 4000))
        open_ones.append(connection)
        if len(open_ones) > 8:
            gone = open_ones.pop(rng.randrange(len(open_ones)))
            if rng.random() < 0.5:
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.close()
        if i % 30 == 0:
            assert server.chat(seed=3)[2]["choices"] == good
    for connection in open_ones:
        connection.close()
    server.model.step_s = 0.0
    server.rest()
    assert server.chat(seed=3)[2]["choices"] == good
    wait_until(lambda: _descriptors() <= descriptors)


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
