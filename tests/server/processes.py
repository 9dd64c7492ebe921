"""`tilewright serve` as processes that tests start and speak to."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

from tilewright.compiler import env

ROOT = Path(__file__).parents[2]
STAND_IN = ("-m", "tests.server.process")


@contextmanager
def serving(*arguments: str, program: tuple[str, ...] = STAND_IN, **variables: str) -> Iterator[subprocess.Popen]:
    """A process that has said where it serves; `url` holds that. It is killed at the end where it still runs."""
    command = [sys.executable, *program, "serve", *arguments, "--port", "0"]
    plain = {name: value for name, value in os.environ.items() if name not in (env.API_KEYS, env.DEBUG)}
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=plain | {"PYTHONPATH": str(ROOT)} | variables
    )
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


def client(process: subprocess.Popen, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key=key, max_retries=0, timeout=30)
