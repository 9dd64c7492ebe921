"""Our server beside llama.cpp's: the same weights, threads and chats by HTTP, the two taking turns.

The peer is llama-cpp-python[server] in a Python of its own. It serves one request after the other; llama.cpp's own
llama-server would batch them, and is not measured here. Each server is a process, idle while the other is timed.
"""

import json
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from results_file import Results

START_S = 120.0
CONTEXT = 2048  # tokens
# Greedy answers of two engines with int8 activations part somewhere, but hardly any with its first words.
FIRST_WORDS, LEAST_ALIKE = 3, 0.5

Ask = Callable[[int, list[dict[str, Any]]], dict[str, Any]]


def ours(artifact: str, threads: int, port: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tilewright",
        "serve",
        f"m={artifact}",
        "--port",
        str(port),
        "--threads",
        str(threads),
    ]


def llama_cpp(python: str, gguf: str, threads: int, port: int) -> list[str]:
    options = {"model": gguf, "model_alias": "m", "n_ctx": CONTEXT, "port": port, "verbose": False}
    # By default it breaks off the stream that runs when the next request comes.
    options |= {"n_threads": threads, "n_threads_batch": threads, "interrupt_requests": False}
    return [python, "-m", "llama_cpp.server", *(f"--{name}={value}" for name, value in options.items())]


def compare(
    results: Results,
    artifact: str,
    gguf: str,
    peer_python: str,
    threads: int,
    bodies: Sequence[dict[str, Any]],
    rounds: int,
    ask: Ask,
) -> None:
    """The case chats-peer: each server's pieces of text a second, ours with the ratio of the two."""
    rates: dict[str, list[float]] = {"tilewright": [], "llama_cpp": []}
    with (
        _process("tilewright", lambda port: ours(artifact, threads, port)) as own,
        _process("llama_cpp", lambda port: llama_cpp(peer_python, gguf, threads, port)) as theirs,
    ):
        check_alike(ask(own, bodies)["texts"], ask(theirs, bodies)["texts"])  # which warms both up, too
        turns = [("tilewright", own), ("llama_cpp", theirs)]
        for _ in range(rounds):
            for name, port in turns:
                figures = ask(port, bodies)
                rates[name].append(figures["tokens"] / figures["seconds"])
            turns.reverse()
    ratio = round(statistics.median(a / b for a, b in zip(*rates.values(), strict=True)), 3)
    results.add(
        "chats-peer", "llama_cpp", rates["llama_cpp"], chats=len(bodies), engine_version=version_of(peer_python)
    )
    results.add("chats-peer", "tilewright", rates["tilewright"], chats=len(bodies), to_llama_cpp=ratio)
    results.ratio("chats-peer")


def check_alike(own: Sequence[str], theirs: Sequence[str]) -> None:
    """SystemExit unless most answers begin with the same words: the model and its template are the same, then."""
    begin = [[re.findall(r"\w+", text.lower())[:FIRST_WORDS] for text in texts] for texts in (own, theirs)]
    same = statistics.mean(a == b for a, b in zip(*begin, strict=True))
    if same < LEAST_ALIKE:
        raise SystemExit(f"the two servers begin {same:.0%} of the answers alike: not timed")
    print(f"check: the two servers begin {same:.0%} of the answers alike")


def version_of(python: str) -> str:
    code = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def _process(name: str, make: Callable[[int], list[str]]) -> Iterator[int]:
    """A server's process for as long as the context lasts; -> its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(make(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(name, process, port)
        yield port
    finally:
        process.kill()
        process.wait()


def _await(name: str, process: subprocess.Popen, port: int) -> None:
    """Waits until the server answers a chat."""
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    head = {"Content-Type": "application/json"}
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with {process.returncode}; run it by hand: {' '.join(process.args)}")
        try:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), head), timeout=30):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{name} does not serve after {START_S:g} s")
