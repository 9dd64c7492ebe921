"""Faults from outside: the process is killed, the disk is full, the clock is put back. Requests go on, or are told."""

import itertools
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.processes import Supervised, client, serving, supervised
from tests.server.serving import MESSAGES, MODEL, answer_to, chat_prompt, post, receive_until, running, wait_until
from tilewright.runtime.server.keys import Key, KeyRecord, digest
from tilewright.runtime.types import SamplingParams

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]


def answer(server: Supervised) -> str | None:
    """What it says to one question; None where nobody serves."""
    try:
        with server.connect() as connection:
            body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 9, "seed": 5, "ignore_eos": True}
            connection.sendall(post("/v1/chat/completions", json.dumps(body).encode(), "Connection: close\r\n"))
            said = receive_until(connection, None)
    except OSError:
        return None
    return json.loads(said.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] if said else None


@pytest.mark.alone
def test_a_killed_server_breaks_its_streams_and_serves_again_within_three_seconds() -> None:
    said = answer_to(chat_prompt(MESSAGES), SamplingParams(max_tokens=9, seed=5, ignore_eos=True))
    with supervised("fake=any.tw", TEST_STEP_S="0.01") as server:
        wait_until(lambda: answer(server) == said)
        body = {"model": MODEL, "messages": MESSAGES, "stream": True, "ignore_eos": True}
        streams = [server.connect() for _ in range(12)]
        for stream in streams:
            stream.sendall(post("/v1/chat/completions", json.dumps(body).encode()))
        for stream in streams[:8]:  # a batch; the others wait
            assert receive_until(stream, b'"delta":{"content"')
        killed_s = time.monotonic()
        server.kill(signal.SIGKILL)
        for stream in streams:
            rest = receive_until(stream, None)
            assert b"[DONE]" not in rest and b'"finish_reason":"' not in rest, "a broken stream looks whole"
            stream.close()
        wait_until(lambda: answer(server) == said)
        assert time.monotonic() - killed_s < 3
        assert server.starts == 2


def test_a_full_disk_under_the_log_delays_nothing_and_loses_lines_alone(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes every write fail from here on, as a full disk does, and can be lifted."""
    log = tmp_path / "log"
    with serving("fake=any.tw", "--log-file", str(log)) as process, client(process) as ask:

        def chat(request: str) -> None:
            done = ask.chat.completions.create(
                model="fake", messages=MESSAGES, max_tokens=4, extra_headers={"X-Request-Id": request}
            )
            assert done.choices[0].finish_reason in ("length", "stop")

        chat("before")
        wait_until(lambda: b'"before"' in log.read_bytes())
        size = log.stat().st_size
        _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        for _ in range(100):
            chat("lost")
        assert log.stat().st_size == size
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
        chat("after")
        wait_until(lambda: chat("after") is None and b'"after"' in log.read_bytes())
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_log_on_a_full_device_and_a_closed_stderr(tmp_path: Path) -> None:
    with serving("fake=any.tw", "--log-file", "/dev/full") as process, client(process) as ask:
        process.stderr.close()
        for _ in range(20):
            assert ask.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=4).usage.completion_tokens
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def jumping(real: Callable[[], float]) -> Callable[[], float]:
    """A wall clock that is set forward and back, by years, with every look at it."""
    rng = random.Random(7)
    return lambda: real() + rng.choice([-1, 1]) * rng.uniform(1e6, 1e8)


def test_a_wall_clock_that_jumps_changes_no_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    record = KeyRecord(name="a", sha256=digest("secret-of-a-key"), requests_per_minute=12)
    headers = {"Authorization": "Bearer secret-of-a-key"}
    monkeypatch.setattr(time, "time", jumping(time.time))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
    with running(keys=[Key(record)]) as server:
        server.model.step_s = 0.002
        params = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
        said = answer_to(chat_prompt(MESSAGES), params)
        for _ in range(11):
            status, _, done = server.chat(headers, max_tokens=30, seed=5, ignore_eos=True, deadline_s=20)
            assert status == 200 and done["choices"][0]["message"]["content"] == said
            assert done["choices"][0]["finish_reason"] == "length" and "stop_reason" not in done["choices"][0]
        assert server.chat(headers)[0] == 200
        assert server.chat(headers)[0] == 429, "a jump has filled the bucket"
        assert server.ask("GET", "/health")[0] == 200
        server.rest()


def test_durations_are_measured_by_monotonic_clocks() -> None:
    """The wall clock is for stamps that people read; each of its uses stands here."""
    stamps = {
        "runtime/server/chat.py": 1,  # created
        "runtime/server/completions.py": 1,
        "runtime/server/responses.py": 1,
        "runtime/server/served.py": 1,
        "runtime/server/envelope.py": 1,  # the ends of a span
    }
    found = {}
    for file in itertools.chain((ROOT / "runtime").rglob("*.py"), (ROOT / "tilewright").rglob("*.py")):
        uses = sum(file.read_text().count(clock) for clock in ("time.time(", "time.time_ns(", "import time as"))
        if uses:
            found[os.fspath(file.relative_to(ROOT))] = uses
    assert found == stamps
