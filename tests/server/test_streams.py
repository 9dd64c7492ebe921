"""Streams: events in order, readers that fall behind, and nothing that stays in memory when they have ended."""

import asyncio
import gc
import json
import socket
import weakref
from collections.abc import Iterator

import pytest

from tests.server.serving import (
    MESSAGES,
    MODEL,
    Running,
    answer_to,
    chat_prompt,
    post,
    receive_until,
    running,
    wait_until,
)
from tilewright.runtime.server.limits import ServerLimits
from tilewright.runtime.server.outlet import Outlet
from tilewright.runtime.server.sse import Frame
from tilewright.runtime.types import SamplingParams

pytestmark = pytest.mark.timeout(60)

LIMITS = ServerLimits(max_unread_bytes=100_000, send_s=20)
ALTERNATIVES = {"logprobs": True, "top_logprobs": 20}  # so many that an answer is larger than a socket's buffers


@pytest.fixture(scope="module")
def _shared() -> Iterator[Running]:
    with running(LIMITS) as it:
        yield it


def events(answer: bytes) -> list[dict]:
    """Those of a whole stream, which ends as it has to."""
    lines = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def begin(server: Running, version: str = "1.1", buffer: int | None = None, **fields: object) -> socket.socket:
    """A connection on which a stream was asked for. buffer: of the socket, in bytes."""
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    body = json.dumps({"model": MODEL, "messages": MESSAGES, "stream": True, "ignore_eos": True, "seed": 3} | fields)
    sent = post("/v1/chat/completions", body.encode(), "Connection: close\r\n")
    connection.sendall(sent.replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1))
    return connection


def test_events_come_in_order_and_say_what_the_device_says(server: Running) -> None:
    with begin(server, n=3, max_tokens=40, stream_options={"include_usage": True}) as connection:
        said = events(receive_until(connection, None))
    params = SamplingParams(n=3, max_tokens=40, seed=3, ignore_eos=True)
    for index in range(3):
        own = [chunk["choices"][0] for chunk in said if chunk["choices"] and chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
        text = "".join(choice["delta"].get("content", "") for choice in own)
        assert text == answer_to(chat_prompt(MESSAGES), params, index)
    assert said[-1]["choices"] == [] and said[-1]["usage"]["completion_tokens"] == 120


def test_a_client_of_http_1_0_gets_the_events_without_chunks(server: Running) -> None:
    with begin(server, version="1.0", max_tokens=20) as connection:
        answer = receive_until(connection, None)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and body.startswith(b"data: {") and b"\r\n" not in body
    assert events(body)[-1]["choices"][0]["finish_reason"] == "length"


def test_who_reads_late_gets_everything(server: Running) -> None:
    fields = {**ALTERNATIVES, "max_tokens": 60}
    with begin(server, **fields) as connection:
        prompt = events(receive_until(connection, None))
    with begin(server, buffer=2048, **fields) as connection:
        wait_until(lambda: server.engine.stats.drawn and not server.engine.busy)
        late = events(receive_until(connection, None))
    assert [chunk["choices"] for chunk in late] == [chunk["choices"] for chunk in prompt]


def test_who_falls_too_far_behind_is_cut_off_at_once(server: Running) -> None:
    """Long before send_s is over."""
    before = server.engine.stats.drawn
    connection = begin(server, buffer=2048, n=8, **ALTERNATIVES)
    wait_until(lambda: server.service.active)
    wait_until(lambda: not server.service.active)
    assert server.engine.stats.drawn - before < 8 * 480, "all of the answers were computed"
    assert b"[DONE]" not in receive_until(connection, None)
    connection.close()


def test_one_stream_that_fails_leaves_the_others_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in what one stream's events become ends that stream."""
    around = Frame.around

    def failing(self: Frame, text: str) -> bytes:
        if b"chatcmpl" in around(self, text):
            raise ZeroDivisionError
        return around(self, text)

    monkeypatch.setattr(Frame, "around", failing)
    plain = json.dumps({"model": MODEL, "prompt": "the dog", "stream": True, "max_tokens": 30, "ignore_eos": True})
    with begin(server, max_tokens=30) as broken, server.connect() as other:
        other.sendall(post("/v1/completions", plain.encode(), "Connection: close\r\n"))
        assert events(receive_until(other, None))[-1]["choices"][0]["finish_reason"] == "length"
        assert b"[DONE]" not in receive_until(broken, None)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "n": 3}], ids=["whole", "stream", "three"])
def test_requests_that_have_ended_are_gone_from_memory(server: Running, fields: dict) -> None:
    """By reference counts alone: what the collector has to find holds up every stream meanwhile."""
    server.model.gate.clear()
    gc.collect()
    gc.disable()
    try:
        connection = begin(server, max_tokens=9, **({"stream": False} | fields))
        wait_until(lambda: server.service.active)
        [generation] = server.service.active
        [request] = generation.requests
        outputs = [sample.output for sample in request.samples]
        parts = [weakref.ref(part) for part in (generation, request, *outputs)]
        del generation, request, outputs
        server.model.gate.set()
        receive_until(connection, None)
        connection.close()
        server.chat()  # the engine remembers the last step's rows
        wait_until(lambda: not any(part() for part in parts))
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "text", ["", "a", '"\\', "\n\r\t", "ü漢🙂", "\0", "\u2028"], ids=["none", "a", "quote", "ctl", "wide", "nul", "ls"]
)
def test_a_frame_is_what_json_says(text: str) -> None:
    chunk = {"id": Frame.HOLE, "choices": [{"delta": {"content": Frame.HOLE}, "logprobs": None}]}
    data = Frame(chunk).around(text)
    assert data.startswith(b"data: ") and data.endswith(b"\n\n") and data.count(b"\n") == 2
    assert json.loads(data[6:]) == {"id": Frame.HOLE, "choices": [{"delta": {"content": text}, "logprobs": None}]}


class Pipe:
    """A transport that takes `room` bytes before it asks to pause."""

    def __init__(self, room: int) -> None:
        self.room, self.taken, self.closing = room, b"", False
        self.outlet: Outlet

    def write(self, data: bytes) -> None:
        self.taken += data
        self.room -= len(data)
        if self.room <= 0:
            self.outlet.pause()

    def more(self, room: int) -> None:
        self.room = room
        self.outlet.resume()

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True
        self.outlet.close()


def test_an_outlet_holds_back_what_its_reader_does_not_take() -> None:
    async def check() -> None:
        pipe = Pipe(3)
        outlet = pipe.outlet = Outlet(pipe, lambda piece: piece, 10)  # type: ignore[arg-type]
        for piece in (b"ab", b"cd", b"ef", b"gh", b"ij"):
            outlet.write(piece)
        assert pipe.taken == b"abcd"
        drained = asyncio.create_task(outlet.drained())
        await asyncio.sleep(0)
        pipe.more(1)
        await asyncio.sleep(0)
        assert pipe.taken == b"abcdef" and not drained.done(), "a pause in the middle was overlooked"
        outlet.write(b"kl")
        pipe.more(100)
        await drained
        assert pipe.taken == b"abcdefghijkl"
        outlet.write(b"mn")
        assert pipe.taken.endswith(b"mn")

    asyncio.run(check())


def test_an_outlet_cuts_off_who_is_too_far_behind() -> None:
    async def check() -> None:
        pipe = Pipe(1)
        outlet = pipe.outlet = Outlet(pipe, lambda piece: piece, 10)  # type: ignore[arg-type]
        for _ in range(6):
            outlet.write(b"ab")
        assert not pipe.closing
        outlet.write(b"c")
        assert pipe.closing and pipe.taken == b"ab"
        outlet.write(b"d")
        await outlet.drained()
        assert pipe.taken == b"ab"

    asyncio.run(check())
