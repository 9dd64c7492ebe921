"""An engine that dies with --restart: its requests are told, /health is red until the next one serves."""

import threading
import time

import pytest

from tests.server.processes import client, serving
from tests.server.serving import LIMITS, MESSAGES, TOKENIZER, PacedModel, receive_until, running, wait_until
from tests.server.test_operations import metrics
from tilewright.compiler.errors import RequestError
from tilewright.runtime.engine import Engine
from tilewright.runtime.server.restarts import MOST_RESTARTS

pytestmark = pytest.mark.timeout(60)


def test_a_new_engine_serves_where_one_died() -> None:
    gate = threading.Event()

    def reopen() -> Engine:
        assert gate.wait(20)
        return Engine(PacedModel(LIMITS, TOKENIZER))

    with running(reopen=reopen) as server:
        server.model.step_s = 0.01
        stream = server.open_stream()
        server.model.broken = True
        said = receive_until(stream, b"}}\n\n\r\n0\r\n\r\n")
        assert b'"code":"engine_dead"' in said and b"[DONE]" not in said
        assert server.ask("GET", "/health")[::2] == (503, {"status": "dead"})
        assert server.chat()[0] == 503
        gate.set()
        begun = time.monotonic()
        wait_until(lambda: server.ask("GET", "/health")[0] == 200)
        assert server.chat(ignore_eos=True)[2]["usage"]["completion_tokens"] == 4
        assert time.monotonic() - begun < 3
        assert metrics(server)["engine_restarts_total"] == 1
        assert server.exit_code is None


def test_an_engine_that_dies_again_and_again_ends_the_process() -> None:
    opened = []

    def reopen() -> Engine:
        model = PacedModel(LIMITS, TOKENIZER)
        model.broken = True
        opened.append(model)
        return Engine(model)

    with running(reopen=reopen) as server:
        server.model.broken = True
        while server.exit_code is None:
            try:
                assert server.chat()[0] == 503
            except OSError:  # it is ending
                time.sleep(0.05)
        assert server.exit_code == 1 and len(opened) == MOST_RESTARTS


def test_what_cant_be_opened_again_ends_the_process() -> None:
    def reopen() -> Engine:
        raise RequestError("it was replaced")

    with running(reopen=reopen) as server:
        server.model.broken = True
        assert server.chat()[0] == 503
        wait_until(lambda: server.exit_code == 1)


def test_the_option_restarts_and_the_engine_learns_to_serve_again() -> None:
    with serving("fake=any.tw", "--restart", TEST_BREAK_AFTER="3") as process, client(process) as ask:
        with pytest.raises(Exception, match="engine has failed"):
            ask.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=9, extra_body={"ignore_eos": True})
        end = time.monotonic() + 3
        while time.monotonic() < end:
            try:
                done = ask.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=2)
                break
            except Exception:
                time.sleep(0.05)
        assert done.choices[0].finish_reason in ("length", "stop")
        assert process.poll() is None
