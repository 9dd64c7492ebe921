"""`tilewright chat` at a terminal: a program in a pty, typed at as a person types."""

import os
import pty
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WAIT_S = 60
CTRL_C, CTRL_D = "\x03", "\x04"

# A model that takes its time over the alphabet, so that an answer can be interrupted.
PROGRAM = """
import sys, time
from pathlib import Path
from tests.fake_model import FakeModel, fake_artifact
from tilewright import cli
from tilewright.runtime import model

class Slow(FakeModel):
    def step(self, batch):
        time.sleep(0.2)
        return super().step(batch)

model.load = lambda path, threads: Slow()
cli.main(["chat", str(fake_artifact(Path(sys.argv[1])).path)])
"""


class Terminal:
    """The program's end of the line: what it shows, and keys."""

    def __init__(self, *command: str) -> None:
        self._pid, self._terminal = pty.fork()
        if not self._pid:
            os.chdir(ROOT)
            os.execv(command[0], command)
        self._shown = ""

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def until(self, text: str, press: str = "") -> str:
        """What is shown up to `text`, which must come; until then the keys `press` are pressed every two seconds."""
        end = time.monotonic() + WAIT_S
        pressed = 0.0
        while text not in self._shown:
            assert time.monotonic() < end, f"no {text!r} came, but {self._shown!r}"
            if press and time.monotonic() > pressed + 2:
                self.type(press)
                pressed = time.monotonic()
            if select.select([self._terminal], [], [], 0.5)[0]:
                self._shown += os.read(self._terminal, 4096).decode()
        before, _, self._shown = self._shown.partition(text)
        return before

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def close(self) -> None:
        os.close(self._terminal)  # hangs up: a program that still runs ends


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    result = Terminal(sys.executable, "-c", PROGRAM, str(tmp_path / "alphabet.tw"))
    yield result
    result.close()


def test_a_conversation_with_interrupts(terminal: Terminal) -> None:
    assert "Ctrl-D" in terminal.until("> ")
    terminal.type("w\r")
    assert terminal.until("> ").split() == ["w", "xyz"]
    terminal.type("a\r")
    terminal.until("bcd")
    terminal.type(CTRL_C)
    assert "z" not in terminal.until("> "), "the answer went on"
    terminal.type("never sent")
    terminal.until("sent")
    # Again and again: Python misses an interrupt that comes between a key and its next wait for one.
    terminal.until("> ", press=CTRL_C)
    terminal.type("v\r")
    terminal.until("wxyz")
    terminal.until("> ")
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0
