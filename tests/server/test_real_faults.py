"""The real model under load, when its process is killed and when its engine fails: streams are told, and a restart
serves again. Restarts take less than three seconds where nothing else runs; the bounds here leave room for other tests,
and `pytest -s` shows the times."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.server.processes import serving, supervised
from tests.server.serving import post, receive_until, wait_until
from tilewright import Engine, SamplingParams, load

pytestmark = [pytest.mark.weights, pytest.mark.slow, pytest.mark.timeout(300)]

MESSAGES = [{"role": "user", "content": "Name the capital of France."}]
STREAMS, BREAK_AFTER = 6, "60"
MOST_S = 20.0

Connect = Callable[[], socket.socket]


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> str:
    with Engine(load(smollm2)) as engine:
        [done] = engine.generate([MESSAGES], SamplingParams(temperature=0, max_tokens=12))
    return done.text


def chat(connect: Connect, **fields: object) -> socket.socket:
    """A connection on which a chat was asked for."""
    body = {"model": "small", "messages": MESSAGES, "temperature": 0} | fields
    connection = connect()
    connection.sendall(post("/v1/chat/completions", json.dumps(body).encode(), "Connection: close\r\n"))
    return connection


def answer(connect: Connect) -> str | None:
    """None where nobody serves."""
    try:
        with chat(connect, max_tokens=12) as connection:
            head, _, said = receive_until(connection, None).partition(b"\r\n\r\n")
    except OSError:
        return None
    return json.loads(said)["choices"][0]["message"]["content"] if b" 200 " in head.split(b"\r\n")[0] else None


@contextmanager
def streams(connect: Connect) -> Iterator[list[socket.socket]]:
    """Chats that stream, all of them in the middle."""
    opened = [chat(connect, stream=True, max_tokens=4000, ignore_eos=True) for _ in range(STREAMS)]
    try:
        for stream in opened:
            assert receive_until(stream, b'"delta":{"content"')
        yield opened
    finally:
        for stream in opened:
            stream.close()


def health(connect: Connect) -> int | None:
    try:
        with connect() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            said = receive_until(connection, None)
    except OSError:
        return None
    return int(said.split()[1]) if said else None


@contextmanager
def watched_health(connect: Connect) -> Iterator[list[int | None]]:
    """What /health says meanwhile, all the time."""
    seen: list[int | None] = []
    end = threading.Event()

    def watch() -> None:
        while not end.wait(0.01):
            seen.append(health(connect))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        end.set()
        thread.join(30)


def broken_streams(opened: list[socket.socket]) -> None:
    """Waits until they have ended, each by an error event."""
    for stream in opened:
        rest = receive_until(stream, None)
        assert b'"code":"engine_dead"' in rest and b"[DONE]" not in rest and b'"finish_reason":"' not in rest


def connecting(url: str) -> Connect:
    port = urlsplit(url).port
    return lambda: socket.create_connection(("127.0.0.1", port), timeout=20)


def test_a_killed_process_breaks_its_streams_and_its_supervisor_starts_another(smollm2: Path, expected: str) -> None:
    with supervised(f"small={smollm2}", program=("-m", "tilewright")) as server:
        wait_until(lambda: answer(server.connect) == expected, 60)
        with streams(server.connect) as opened:
            begun_s = time.monotonic()
            server.kill(signal.SIGKILL)
            for stream in opened:
                rest = receive_until(stream, None)
                assert b"[DONE]" not in rest and b'"finish_reason":"' not in rest, "a broken stream looks whole"
            closed_s = time.monotonic() - begun_s
        wait_until(lambda: answer(server.connect) == expected, MOST_S)
        print(f"killed: streams closed after {closed_s:.2f} s, answered again after {time.monotonic() - begun_s:.2f} s")
        assert closed_s < 5 and server.starts == 2


def test_an_engine_that_fails_ends_the_process(smollm2: Path) -> None:
    with serving(f"small={smollm2}", TEST_BREAK_REAL_AFTER=BREAK_AFTER) as process:
        connect = connecting(process.url)
        with watched_health(connect) as seen, streams(connect) as opened:
            broken_streams(opened)
            begun_s = time.monotonic()
            code = process.wait(MOST_S)
            print(f"failed: the process ended {time.monotonic() - begun_s:.2f} s after its streams")
        assert code == 1 and time.monotonic() - begun_s < 5
        assert seen[0] == 200 and 503 in seen


def test_an_engine_that_fails_is_replaced(smollm2: Path, expected: str) -> None:
    with serving(f"small={smollm2}", "--restart", TEST_BREAK_REAL_AFTER=BREAK_AFTER) as process:
        connect = connecting(process.url)
        with watched_health(connect) as seen, streams(connect) as opened:
            broken_streams(opened)
            begun_s = time.monotonic()
            wait_until(lambda: answer(connect) == expected, MOST_S)
            print(f"restarted: answered again {time.monotonic() - begun_s:.2f} s after the streams ended")
            wait_until(lambda: seen[-1] == 200)
        assert seen[0] == 200 and 503 in seen and process.poll() is None
