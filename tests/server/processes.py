"""`tilewright serve` as processes that tests start and speak to."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

from tilewright.compiler import env

ROOT = Path(__file__).parents[2]
STAND_IN = ("-m", "tests.server.process")


def _environment(variables: dict[str, str]) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in (env.API_KEYS, env.DEBUG)}
    return plain | {"PYTHONPATH": str(ROOT)} | variables


@contextmanager
def serving(*arguments: str, program: tuple[str, ...] = STAND_IN, **variables: str) -> Iterator[subprocess.Popen]:
    """A process that has said where it serves; `url` holds that. It is killed at the end where it still runs."""
    command = [sys.executable, *program, "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=_environment(variables))
    try:
        for line in process.stderr:
            if found := re.search(r"serving .* at (https?://\S+)", line):
                process.url = found[1]
                break
        else:
            raise AssertionError("it ended before it served")
        yield process
    finally:
        process.kill()
        process.wait(10)
        process.stderr.close()


class Supervised:
    """`tilewright serve` at one port, started again whenever it ends, as systemd would."""

    def __init__(self, arguments: tuple[str, ...], program: tuple[str, ...], variables: dict[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.starts = 0
        self._command = [sys.executable, *program, "serve", *arguments, "--port", str(self.port)]
        self._environment = _environment(variables)
        self._ending = threading.Event()
        self._process = self._start()
        self._watch = threading.Thread(target=self._keep)
        self._watch.start()

    def connect(self) -> socket.socket:
        """Raises OSError while nobody listens."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def kill(self, how: signal.Signals) -> None:
        self._process.send_signal(how)

    def end(self) -> None:
        self._ending.set()
        self.kill(signal.SIGKILL)
        self._watch.join(10)

    def _start(self) -> subprocess.Popen:
        self.starts += 1
        return subprocess.Popen(self._command, cwd=ROOT, stderr=subprocess.DEVNULL, env=self._environment)

    def _keep(self) -> None:
        while True:
            self._process.wait()
            if self._ending.is_set():
                return
            self._process = self._start()
            if self._ending.is_set():  # since it was asked
                self._process.kill()


@contextmanager
def supervised(*arguments: str, program: tuple[str, ...] = STAND_IN, **variables: str) -> Iterator[Supervised]:
    server = Supervised(arguments, program, variables)
    try:
        yield server
    finally:
        server.end()


def client(process: subprocess.Popen, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key=key, max_retries=0, timeout=30)
