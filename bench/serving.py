"""The server: what HTTP adds to the engine, what kept prefixes save, and throughput by HTTP beside the engine's own.

Before anything is timed, answers by HTTP must be the engine's.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cases import SERVING_CASES
from results_file import Results, about
from serving_client import between_ms

from tilewright import Engine, EngineLimits, SamplingParams
from tilewright.runtime.server import memory
from tilewright.runtime.server.app import create_app
from tilewright.runtime.server.lifecycle import Server, bind
from tilewright.runtime.server.served import Served
from tilewright.runtime.server.service import Service

HERE = Path(__file__).parent
STREAMS, STEP_S, ANSWER = 100, 0.02, 300
CHATS, CHAT_ANSWER = 64, 64
SYSTEM_TOKENS = 2000
WORDS = ["the", "river", "mountain", "compiler", "page", "of", "under", "quick", "slow", "green", "tree", "over"]


def run(args: argparse.Namespace) -> None:
    from compile_time import processor

    memory.settle()  # as `tilewright serve` does
    wanted = set(args.only or (SERVING_CASES if args.peer_python else SERVING_CASES.keys() - {"chats-peer"}))
    results = Results(
        args.results or HERE / "results" / "serving.jsonl",
        SERVING_CASES,
        about(args.commit, processor(), ("starlette", "uvicorn", "h11"), threads=args.threads),
    )
    if "http-overhead" in wanted:
        results.add("http-overhead", "tilewright", [http_overhead() for _ in range(args.rounds)])
    if "chats-peer" in wanted:
        import serving_peer

        peer = (args.gguf, args.peer_python, args.threads)
        serving_peer.compare(results, args.artifact, *peer, chat_bodies(), args.rounds, ask)
    if wanted - {"http-overhead", "chats-peer"}:
        import tilewright

        model = tilewright.load(args.artifact, threads=args.threads)
        if wanted & {"prefix-cold", "prefix-warm"}:
            cold, warm = prefix_ms(model, args.rounds)
            results.add("prefix-cold", "tilewright", cold)
            results.add("prefix-warm", "tilewright", warm)
        if wanted & {"long-prompt-p99", "long-prompt-first"}:
            import long_prompt

            ratios, first_ms, facts = long_prompt.measure(model, args.rounds)
            results.add("long-prompt-p99", "tilewright", ratios, **facts)
            results.add("long-prompt-first", "tilewright", first_ms, **facts)
        if wanted & {"chats-engine", "chats-http"}:
            engine, http = chats(model, args.rounds)
            to_engine = round(statistics.median(b / a for a, b in zip(engine, http, strict=True)), 3)
            results.add("chats-engine", "tilewright", engine)
            results.add("chats-http", "tilewright", http, to_engine=to_engine)
            print(f"{'chats-http':16} {'to engine':12} {to_engine:10.2f} ×", flush=True)


# -- what HTTP adds ----------------------------------------------------------------------------------------------------


def http_overhead() -> float:
    """Milliseconds: the 99th percentile of times between tokens by HTTP, less that of the engine's own streams."""
    from serving_stub import StubModel

    model: Any = StubModel(STEP_S)
    with Engine(model) as engine:
        direct = asyncio.run(_direct(engine))
    with serving(Engine(model)) as port:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": ANSWER, "stream": True}
        by_http = ask(port, [body] * STREAMS)["between_ms"]
    assert min(len(by_http), len(direct)) > STREAMS * ANSWER / 2, "the streams hardly ran together"
    return float(np.percentile(by_http, 99) - np.percentile(direct, 99))


async def _direct(engine: Engine) -> list[float]:
    async def one() -> list[float]:
        messages = [{"role": "user", "content": "hi"}]
        times = [time.perf_counter() async for _ in engine.stream(messages, SamplingParams(max_tokens=ANSWER))]
        return times

    return between_ms(await asyncio.gather(*(one() for _ in range(STREAMS))))


# -- a real model ------------------------------------------------------------------------------------------------------


def prefix_ms(model: Any, rounds: int) -> tuple[list[float], list[float]]:
    """First tokens of two requests after one system prompt, another one each round: (the first's, the second's)."""
    cold, warm = [], []
    with serving(Engine(model, EngineLimits(keep_prefixes=True))) as port, Engine(model) as plain:
        for round_ in range(rounds + 1):
            rng = np.random.default_rng(round_)
            system = " ".join(rng.choice(WORDS, SYSTEM_TOKENS))
            system = model.tokenizer.decode(model.tokenizer.encode(system)[:SYSTEM_TOKENS])
            for question, times in (("What is this about?", cold), ("Which word is the last?", warm)):
                messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
                figures = ask(
                    port, [{"model": "m", "messages": messages, "max_tokens": 8, "stream": True, "temperature": 0}]
                )
                if round_ == 0:
                    [done] = plain.generate([messages], SamplingParams(temperature=0, max_tokens=8))
                    assert figures["texts"] == [done.text], "kept pages changed an answer"
                else:
                    times += figures["first_ms"]
    return cold, warm


def chats(model: Any, rounds: int) -> tuple[list[float], list[float]]:
    """Tokens a second of all chats at once: (by the engine, by HTTP), taking turns at being first."""
    bodies = [body | {"ignore_eos": True} for body in chat_bodies()]
    params = SamplingParams(temperature=0, max_tokens=CHAT_ANSWER, ignore_eos=True)

    def by_engine() -> tuple[float, list[str]]:
        with Engine(model) as engine:
            begun = time.perf_counter()
            done = engine.generate([body["messages"] for body in bodies], params)
            return time.perf_counter() - begun, [completion.text for completion in done]

    def by_http() -> tuple[float, list[str]]:
        with serving(Engine(model)) as port:
            figures = ask(port, bodies)
            return figures["seconds"], figures["texts"]

    ways = [by_engine, by_http]
    rates: dict[Any, list[float]] = {way: [] for way in ways}
    expected = by_engine()[1]  # and all of the model's memory has been in use once
    for _ in range(rounds):
        for way in ways:
            seconds, texts = way()
            assert texts == expected, "answers by HTTP are not the engine's"
            rates[way].append(CHATS * CHAT_ANSWER / seconds)
        ways.reverse()
    return rates[by_engine], rates[by_http]


def chat_bodies() -> list[dict[str, Any]]:
    plain = {"model": "m", "max_tokens": CHAT_ANSWER, "temperature": 0, "stream": True}
    questions = [f"Write a story about the number {i}." for i in range(CHATS)]
    return [plain | {"messages": [{"role": "user", "content": question}]} for question in questions]


@contextmanager
def serving(engine: Engine) -> Iterator[int]:
    """A server around the engine, for as long as the context lasts; -> its port."""
    tokenizer = engine._intake._tokenizer
    assert tokenizer is not None
    service = Service.of([Served("m", engine, tokenizer)])
    bound = bind("127.0.0.1", 0)
    server = Server(create_app(service), service, bound)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        server.end()
        thread.join()


def ask(port: int, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The client's figures (serving_client.py)."""
    asked = json.dumps({"port": port, "bodies": list(bodies)})
    client = [sys.executable, str(HERE / "serving_client.py")]
    return json.loads(subprocess.run(client, input=asked, capture_output=True, text=True, check=True).stdout)
