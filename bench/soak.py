"""A soak: many clients at once, some of them bad ones, for minutes; at the end nothing may be left of them.

    python bench/soak.py ARTIFACT --seconds 300         a compiled model, on this processor
    python bench/soak.py --stub --seconds 10            a stub, which checks all that the engine hands it

A line goes to bench/results/soak.jsonl where all checks hold (`faults`), and nowhere else; else they are named, and the
exit code is 1. Its figure is what the server's memory grew by: the median of the last quarter less that of the first,
after a fifth of the time to warm up.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for the stub, which is the tests'

from cases import SOAK_CASES  # noqa: E402
from compile_time import processor  # noqa: E402
from results_file import Results, about  # noqa: E402
from soak_clients import KINDS, Client, Tally  # noqa: E402

REST_S = 30.0  # for the last requests to end
WARM_UP, PART = 1 / 5, 1 / 4  # of the time, of what comes after it

Look = Mapping[str, Any]


class Server:
    """The server's process, as soak_server.py has it."""

    def __init__(self, args: argparse.Namespace, log: Path) -> None:
        what = ["--stub"] if args.stub else [args.artifact, "--threads", str(args.threads)]
        command = [sys.executable, str(HERE / "soak_server.py"), *what, "--log", str(log)]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        said = self._said()
        self.port, self.context = said["port"], said["context"]

    def look(self) -> Look:
        assert self._process.stdin is not None
        self._process.stdin.write("look\n")
        self._process.stdin.flush()
        return self._said()

    def at_rest(self) -> Look:
        """A look when nothing runs, or the last one where something does not come to an end."""
        end = time.monotonic() + REST_S
        while not (look := self.look())["idle"] and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.5)  # for the tasks and sockets of what ended last
        return self.look() if look["idle"] else look

    @property
    def memory_mib(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def end(self) -> int:
        """Lets it drain; -> its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(REST_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _said(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the server ended by itself, with {self._process.wait()}")
        return json.loads(line)


async def load(server: Server, clients: int, seconds: float, answer: int, seed: int) -> tuple[Tally, list[float]]:
    """-> (what the clients saw, the server's memory in MiB, as it was each second or so)."""
    tally, memory = Tally(), []
    until_s = time.monotonic() + seconds
    every_s = min(1.0, seconds / 40)
    running = [Client(server.port, server.context, answer, tally, seed + i).run(until_s) for i in range(clients)]
    asking = asyncio.gather(*running)
    while time.monotonic() < until_s:
        await asyncio.sleep(every_s)
        memory.append(server.memory_mib)
    await asking
    return tally, memory


def growth_mib(memory: Sequence[float]) -> float:
    warm = memory[int(len(memory) * WARM_UP) :]
    part = max(1, int(len(warm) * PART))
    return statistics.median(warm[-part:]) - statistics.median(warm[:part])


def faults(before: Look, after: Look, tally: Tally, grown_mib: float, most_mib: float, exit_code: int) -> list[str]:
    """What is wrong after a soak, in words. before, after: looks at a server at rest."""
    found = list(tally.wrong)
    if after["failure"]:
        found.append(f"the engine failed: {after['failure']}")
    if not after["idle"]:
        found.append(f"requests are still running {REST_S:g} s after the last client left")
    if after["books"]:
        found.append(f"the engine's books are wrong: {after['books']}")
    if after["used_pages"]:
        found.append(f"{after['used_pages']} pages are leaked")
    for what in ("tasks", "descriptors"):
        if after[what] > before[what]:
            found.append(f"{after[what] - before[what]} {what} are leaked: {before[what]} before, {after[what]} after")
    if after["accepted"] != after["ended"]:
        found.append(f"{after['accepted']} requests were accepted, and {after['ended']} ended")
    if grown_mib > most_mib:
        found.append(f"memory grew by {grown_mib:.1f} MiB, and {most_mib:g} are allowed")
    if exit_code:
        found.append(f"the server ended with {exit_code}")
    missing = [kind.__name__ for kind in KINDS if not tally.sent[kind.__name__]]
    if missing or not tally.cut_off or not tally.reasons:
        found.append(f"the load was too small: kinds {missing} never sent, {tally.cut_off} readers cut off; run longer")
    return found


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args, Path(folder) / "log")
        asyncio.run(load(server, 4, args.seconds / 20, args.answer, args.seed - 4))  # all is imported, all is open once
        before = server.at_rest()
        tally, memory = asyncio.run(load(server, args.clients, args.seconds, args.answer, args.seed))
        after = server.at_rest()
        exit_code = server.end()
    grown_mib = growth_mib(memory)
    found = faults(before, after, tally, grown_mib, args.most_growth_mib, exit_code)
    for fault in found[:20]:
        print(fault, file=sys.stderr)
    if found:
        sys.exit(f"{len(found)} faults; no result is written")
    facts = about(args.commit, processor(), ("starlette", "uvicorn", "h11"), threads=args.threads)
    results = Results(args.results or HERE / "results" / "soak.jsonl", SOAK_CASES, facts)
    results.add("soak", "tilewright", [grown_mib], **report(args, before, after, tally, memory))


def report(
    args: argparse.Namespace, before: Look, after: Look, tally: Tally, memory: Sequence[float]
) -> dict[str, Any]:
    return {
        "model": "stub" if args.stub else Path(args.artifact).name,
        "seconds": args.seconds,
        "clients": args.clients,
        "seed": args.seed,
        "most_growth_mib": args.most_growth_mib,
        "memory_mib": [round(memory[int(len(memory) * WARM_UP)], 1), round(max(memory), 1), round(memory[-1], 1)],
        "sent": dict(tally.sent),
        "statuses": dict(tally.statuses),
        "reasons": dict(tally.reasons),
        "cut_off": tally.cut_off,
        **{name: after[name] for name in ("accepted", "ended", "steps", "drawn", "prefix_hits", "used_pages")},
        **{name: [before[name], after[name]] for name in ("tasks", "descriptors")},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", help="what to serve")
    parser.add_argument("--stub", action="store_true", help="serve a stub instead")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--answer", type=int, default=200, help="tokens of the longest answers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most-growth-mib", type=float, default=16)
    parser.add_argument("--results", type=Path, help="the file of lines")
    parser.add_argument("--commit", help="what is soaked, where this is no checkout of it")
    args = parser.parse_args()
    if args.stub == bool(args.artifact):
        parser.error("name an artifact, or give --stub, and not both")
    return args


if __name__ == "__main__":
    main()
