"""The server of a soak (soak.py), in a process of its own.

It says its port, answers each line it reads with a look at itself, as JSON, and ends when it reads no more.
"""

import argparse
import asyncio
import gc
import json
import os
import socket
import sys
import threading
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from tilewright import Engine, EngineLimits
from tilewright.runtime.server import memory
from tilewright.runtime.server.app import create_app
from tilewright.runtime.server.lifecycle import Server, bind
from tilewright.runtime.server.limits import ServerLimits
from tilewright.runtime.server.logs import logging_to
from tilewright.runtime.server.served import Served
from tilewright.runtime.server.service import Service

LIMITS = ServerLimits(max_body_bytes=1 << 20, max_unread_bytes=1 << 18, header_s=3, body_s=3, send_s=2)
MOST_WAITING = 4096
KV_TOKENS = 8192  # few, so that all pages have been written before memory is looked at
SEND_BUFFER = 16 << 10  # bytes a socket: few, so that slow readers hold up the server and not the kernel


def main() -> None:
    args = parse()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as well
    model = stub() if args.stub else load(args.artifact, args.threads)
    engine = Engine(model, EngineLimits(max_queue=MOST_WAITING, keep_prefixes=True))
    with logging_to(args.log):
        service = Service.of([Served("m", engine, model.tokenizer)], LIMITS)
        bound = bind("127.0.0.1", 0)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        server = Server(create_app(service), service, bound)
        memory.settle()
        thread = threading.Thread(target=listen, args=(server, service, engine, answers), daemon=True)
        print(json.dumps({"port": bound.getsockname()[1], "context": engine.capacity}), file=answers, flush=True)
        thread.start()
        sys.exit(server.run())


def stub() -> Any:
    """A device that checks every page table and every position it is given."""
    from tests.server.serving import LIMITS, TOKENIZER, PacedModel

    model = PacedModel(replace(LIMITS, max_batch=32, max_tokens=256, num_pages=2048), TOKENIZER)
    model.steps = deque(maxlen=1)  # a list of all would grow
    return model


def load(artifact: str, threads: int) -> Any:
    import tilewright

    return tilewright.load(artifact, threads=threads, kv_tokens=KV_TOKENS)


def listen(server: Server, service: Service, engine: Engine, answers: TextIO) -> None:
    for _ in sys.stdin:
        print(json.dumps(look(service, engine)), file=answers, flush=True)
    server.end()


def look(service: Service, engine: Engine) -> dict[str, Any]:
    """What the server holds, and has counted. books: what is wrong with the engine's, where it is at rest."""
    idle = not service.active and not engine.busy
    counts = _counts(service)
    return {
        "idle": idle,
        "books": _wrong_in(engine) if idle else "",
        "used_pages": engine.load.used_pages,
        "tasks": sum(isinstance(each, asyncio.Task) and not each.done() for each in gc.get_objects()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "failure": str(engine.failure or ""),
        "steps": engine.stats.steps,
        "drawn": engine.stats.drawn,
        "prefix_hits": engine.stats.prefix_hits,
        "accepted": counts.get("request_prompt_tokens_count", 0),
        "ended": counts.get("request_success_total", 0),
    }


def _counts(service: Service) -> dict[str, int]:
    """Sums of metrics by name, over their labels."""
    sums: dict[str, int] = {}
    for metric in service.metrics.registry.collect():
        for sample in metric.samples:
            name = sample.name.partition(":")[2]
            sums[name] = sums.get(name, 0) + int(sample.value)
    return sums


def _wrong_in(engine: Engine) -> str:
    try:
        engine.check_invariants()
    except AssertionError as error:
        return str(error) or "the page pool's counts"
    return ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("--stub", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
