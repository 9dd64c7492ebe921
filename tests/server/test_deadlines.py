"""Deadlines by HTTP: refused at once where the first token can't be there, with a status that says whether to retry."""

import threading
from collections.abc import Iterator

import pytest

from tests.server.serving import Running, running, wait_until
from tilewright.runtime.types import EngineLimits

pytestmark = pytest.mark.timeout(60)

STEP_S = 0.1


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """A server that has seen steps of STEP_S."""
    with running(engine_limits=EngineLimits()) as server:
        server.model.step_s = STEP_S
        server.chat(max_tokens=2)
        yield server


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_deadline_that_can_never_be_met_is_the_clients_error(slow: Running, stream: bool) -> None:
    steps = len(slow.model.steps)
    status, headers, body = slow.chat(deadline_s=STEP_S / 5, stream=stream)
    assert status == 400 and "retry-after" not in headers
    assert (body["error"]["code"], body["error"]["param"]) == ("deadline_too_short", "deadline_s")
    assert "at best" in body["error"]["message"]
    slow.rest()
    assert len(slow.model.steps) == steps, "something was computed"


def test_a_deadline_that_the_prompts_before_it_rule_out_may_be_met_later(slow: Running) -> None:
    # Several steps of the most tokens, which are learnt to take as long as the few of the first did.
    long = {"messages": [{"role": "user", "content": "dog " * 200}], "max_tokens": 1}
    slow.chat(**long)
    begun = len(slow.model.steps)
    thread = threading.Thread(target=slow.chat, kwargs=long)
    thread.start()
    wait_until(lambda: len(slow.model.steps) > begun)
    status, headers, body = slow.chat(deadline_s=STEP_S)
    thread.join()
    assert status == 429 and int(headers["retry-after"]) >= 1 and body["error"]["code"] == "deadline_too_short"
    assert "prompts before it" in body["error"]["message"]
    slow.rest()


def test_a_deadline_that_can_be_met_cuts_the_answer(slow: Running) -> None:
    status, _, body = slow.chat(deadline_s=5 * STEP_S, max_tokens=100, ignore_eos=True)
    assert status == 200 and body["choices"][0]["stop_reason"] == "deadline"
    assert 0 < body["usage"]["completion_tokens"] < 10
