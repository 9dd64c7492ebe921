"""Drives a server open-loop: a request is sent when it is due, however many are still being answered.

A closed loop, where a client waits for an answer before it asks again, slows down with the server and hides its queue
(Schroeder et al. 2006, "Open Versus Closed: A Cautionary Tale"). Times count from when a request was due.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from tilewright.traffic.arrivals import Arrival
from tilewright.traffic.client import Outcome, Target, ask, prompt_of


@dataclass(frozen=True)
class Standing:
    """How far a run is, in requests."""

    sent: int
    answered: int
    failed: int
    total: int


Report = Callable[[Standing], None]


def open_session(timeout_s: float) -> aiohttp.ClientSession:
    """As many connections as there are requests. timeout_s: for one answer as a whole."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=timeout_s))


async def drive(
    session: aiohttp.ClientSession, target: Target, arrivals: Sequence[Arrival], seed: int, report: Report
) -> list[Outcome]:
    """Sends all requests and waits for their answers. seed: of the prompts. report: called as things go on."""
    prompts = [prompt_of(each.prompt_tokens, seed * 1_000_003 + i) for i, each in enumerate(arrivals)]
    outcomes: list[Outcome] = []
    tasks: list[asyncio.Task[Outcome]] = []

    def note(task: "asyncio.Task[Outcome]") -> None:
        if not task.cancelled():
            outcomes.append(task.result())
        tell()

    def tell() -> None:
        report(Standing(len(tasks), len(outcomes), sum(each.error is not None for each in outcomes), len(arrivals)))

    start_s = time.perf_counter()
    for arrival, prompt in zip(arrivals, prompts, strict=True):
        while (wait_s := arrival.due_s - (time.perf_counter() - start_s)) > 0:
            await asyncio.sleep(min(wait_s, 1.0))
            tell()
        task = asyncio.create_task(ask(session, target, arrival, prompt, start_s))
        task.add_done_callback(note)
        tasks.append(task)
    return list(await asyncio.gather(*tasks))
