"""A worker process: asked, hung, ended, started again, and gone with the process that started it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewright.tuner.process import Ended, Hung, Worker

ROOT = Path(__file__).parents[2]
MODULE = "tests.tune.answering"


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(MODULE)
    yield made
    made.close()


def test_one_process_answers_until_it_is_closed(worker: Worker) -> None:
    first = worker.ask(("", 0), 60)
    assert worker.ask(("", 0), 60) == first != os.getpid()
    worker.close()
    assert worker.ask(("", 0), 60) != first


def test_one_that_ends_says_how_and_is_started_again(worker: Worker) -> None:
    first = worker.ask(("", 0), 60)
    with pytest.raises(Ended, match=r"^ended with status 3: the last words$") as end:
        worker.ask(("end", 3), 60)
    assert end.value.status == 3
    assert worker.ask(("", 0), 60) != first
    with pytest.raises(Ended, match="ended by SIGABRT"):
        worker.ask(("abort", 0), 60)


def test_one_that_hangs_is_ended(worker: Worker) -> None:
    first = worker.ask(("", 0), 60)
    with pytest.raises(Hung, match=r"no answer in 0\.2 s"):
        worker.ask(("sleep", 60), 0.2)
    assert gone(first)
    assert worker.ask(("", 0), 60) != first


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    script = f"""
from tilewright.tuner.process import Worker
worker = Worker({MODULE!r})
print(worker.ask(("", 0), 60), flush=True)
worker.ask(("sleep", 600), 600)
"""
    running = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert running.stdout is not None
    process = int(running.stdout.readline())
    assert not gone(process)
    running.kill()
    running.communicate()
    end_s = time.monotonic() + 10
    while not gone(process) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert gone(process)


def gone(process: int) -> bool:
    """Whether it has ended, though nobody may have asked for its status."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
