"""The serving loop: receive, schedule, launch, process. One thread turns it; any thread may submit and cancel.

Where the device runs ahead, a step is launched before the one before it is processed, so that the device never waits
for the host: a token that is drawn in one step and computed in the next is handed on by the device. A sample that turns
out to have ended leaves a row in the step after, whose draw is dropped.

It knows no text, no threads and no clock but the one it is given, so tests and simulations turn it by hand.
"""

import math
import threading
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from tilewright.runtime.batch import BatchBuilder
from tilewright.runtime.deadlines import refusal
from tilewright.runtime.embedding import Embedder
from tilewright.runtime.kv_cache import PagePool, pages_for
from tilewright.runtime.prefix_tree import PrefixTree
from tilewright.runtime.request import Request, Sample
from tilewright.runtime.scheduler.counters import VirtualCounters
from tilewright.runtime.scheduler.policy import Budget, Plan, Policy, View
from tilewright.runtime.types import (
    Costs,
    EngineError,
    Executor,
    FinishReason,
    StepResult,
    StreamEvent,
    TokenLogprob,
    Work,
)

Clock = Callable[[], float]


def _unheard() -> None:
    """For a core whose requests listen for themselves."""


@dataclass
class Stats:
    """Counts since the start. step_s: seconds of all steps, launch to result. replays: preempted samples whose pages
    found no room beside the device's, so that their tokens were computed again, one by one as before. prefix_queries,
    prefix_hits: tokens of prompts, and those of them that were in the cache."""

    steps: int = 0
    tokens: int = 0
    drawn: int = 0
    step_s: float = 0.0
    preemptions: int = 0
    replays: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    copied_pages: int = 0


@dataclass(frozen=True)
class Load:
    """What an engine holds at one moment. waiting, running: samples. pages, used_pages: of the KV pool. kept_pages: of
    those not in use, hold what later prompts may begin with."""

    waiting: int
    running: int
    pages: int
    used_pages: int
    kept_pages: int


@dataclass
class Flight:
    """A step that was launched and is not processed yet.

    rows, places: the sample of each row, and where in its tokens the drawn one goes. members: all samples whose pages
    the step uses. launched_s: by the core's clock. leaving: those that are on no list any more; their pages are given
    back when the step is done.
    """

    pending: Any
    rows: list[Sample]
    places: list[int]
    members: set[Sample]
    work: Work
    launched_s: float
    leaving: list[Sample] = field(default_factory=list)
    landed: bool = False


@dataclass
class EngineCore:
    """Turns requests into steps of `executor` as `policy` plans them.

    told: called after each batch of events, a step's tokens for one; on the loop's thread, must not raise.
    An exception out of a turn ends every request with "error" and leaves the core dead: `failure` says why.
    """

    executor: Executor
    budget: Budget
    policy: Policy
    costs: Costs | None = None
    clock: Clock = time.perf_counter
    keep_prefixes: bool = False
    told: Callable[[], None] = _unheard
    waiting: list[Sample] = field(default_factory=list)
    running: list[Sample] = field(default_factory=list)
    swapped: list[Sample] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        limits = self.executor.limits
        kept = PrefixTree(limits.page_size) if self.keep_prefixes else None
        self.pool = PagePool(limits.num_pages, limits.page_size, kept)
        self._builder = BatchBuilder(limits.page_size, limits.max_context)
        self.embedder = Embedder(self.executor, self.budget, self.pool, self._builder)
        self._counters = VirtualCounters()
        self._landed_s = -math.inf  # the last step
        self._flights: deque[Flight] = deque()
        self._inbox: deque[tuple[str, Request]] = deque()
        self._timed: list[Request] = []  # those with a deadline
        self._door = threading.Lock()  # nobody slips in while the core dies

    # -- from any thread --

    def submit(self, request: Request) -> None:
        with self._door:
            if self.failure is not None:
                raise EngineError(f"the engine is dead: {self.failure}") from self.failure
            request.submitted_s = self.clock()
            self._inbox.append(("submit", request))

    def cancel(self, request: Request) -> None:
        """Ends a request's unfinished samples before the next step; does nothing to a finished one."""
        self._inbox.append(("cancel", request))

    @property
    def busy(self) -> bool:
        return bool(self._inbox or self._flights or next(self._samples(), None))

    @property
    def load(self) -> Load:
        waiting = len(self._inbox) + len(self.waiting) + len(self.swapped) + len(self.embedder.waiting)
        pool = self.pool
        return Load(
            waiting,
            len(self.running) + len(self.embedder.running),
            pool.num_pages,
            pool.num_pages - pool.free,
            pool.idle,
        )

    # -- from the loop's thread --

    def turn(self) -> None:
        """One round of the loop."""
        try:
            self._receive()
            plan = self._schedule()
            if plan is not None:
                self._launch(plan)
            self._process(ahead=int(plan is not None and self.executor.runs_ahead))
            self._embed()
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Ends every request with "error", and lets no other in."""
        with self._door:
            self.failure = error
        for request in [*self._requests(), *(request for _, request in self._inbox)]:
            self._finish(request, "error")
        self._flights.clear()
        self.told()

    def check_invariants(self) -> None:
        """Raises AssertionError unless the books are right. Between turns; when idle, every page must be free."""
        self.pool.check(sample.table for sample in chain(self.running, self._leaving(), self.embedder.running))
        assert not any(len(sample.table) or sample.computed for sample in self.waiting), "a waiting sample holds pages"
        assert not any(len(sample.table) for sample in self.swapped), "a swapped sample holds pages"
        listed = [*self._samples(), *self._leaving()]
        assert len({sample.rank for sample in listed}) == len(listed), "a sample is listed twice"
        for samples in (self.waiting, self.running, self.swapped, self.embedder.waiting, self.embedder.running):
            assert samples == sorted(samples, key=_rank), "samples are not in order of seniority"
        assert sum(sample.width for sample in self.running) <= self.budget.max_batch, "more rows than the batch has"
        for sample in self._samples():
            assert (sample.swapped is not None) == (sample in self.swapped), "a handle is lost, or kept too long"
            assert sample.output.completion is None, "a finished sample is still listed"
            assert 0 <= sample.computed < sample.length, "a sample has nothing left to compute"
            assert sample.known == sample.request.prompt_tokens + sample.drawn, "a draw was lost"

    def _receive(self) -> None:
        while self._inbox:
            kind, request = self._inbox.popleft()
            if kind == "cancel":
                self._finish(request, "cancelled")
            elif not request.finished:
                if request.params.deadline_s is not None:
                    self._timed.append(request)
                if request.embeds:
                    insort(self.embedder.waiting, request.samples[0], key=_rank)
                    request.decide()
                else:
                    self._take_in(request)
        if self._timed:
            self._timed = [request for request in self._timed if not request.finished]
            now_s = self.clock()
            for request in self._timed:
                if request.deadline_s <= now_s:
                    self._finish(request, "deadline")
        self.told()

    def _take_in(self, request: Request) -> None:
        """Queues a request, or refuses it."""
        if self.costs is not None:
            running = [(sample.computed, sample.request.prompt_tokens) for sample in self.running]
            cached = len(self._cached(request.samples[0])) * self.pool.page_size
            request.refusal = refusal(request, cached, running, self.costs, self.budget)
        if request.refusal is not None:
            self._finish(request, "deadline")
        else:
            self._counters.arrive(request.tenant, (sample.tenant for sample in self.waiting))
            insort(self.waiting, request.samples[0], key=_rank)
        request.decide()

    def _schedule(self) -> Plan[Sample] | None:
        """The next step, its samples on the list of those that run. None where the last one must be processed first."""
        if self._flights and any(sample.reads_tokens for sample in self._flights[-1].rows):
            self._process()  # penalties and grammars go by the values of tokens
        self._swap_back()
        self._admit_prompts()
        plan = self._plan()
        if plan is not None and self._flights and (plan.preempt or not plan.chunks):
            self._process()  # pages may come free
            plan = self._plan()
        while plan is not None and (plan.preempt or not plan.chunks) and self._take_back():
            plan = self._plan()
        if plan is None or (not plan.chunks and self.embedder.running):
            return None
        if not plan.chunks:
            raise EngineError(f"{self.policy} computes nothing with {len(self.waiting)} requests waiting")
        for sample in plan.preempt:
            self._preempt(sample)
        for sample, pages in plan.admit:
            self._admit(sample, pages)
        return plan

    def _plan(self) -> Plan[Sample] | None:
        """What the policy wants. It does not see who waits behind a swapped sample, or behind a prompt to embed: nobody
        new takes their place."""
        waiting = self.waiting
        for others in (self.swapped, self.embedder.waiting):
            if others:
                waiting = [sample for sample in waiting if sample.rank < others[0].rank]
        if not (waiting or self.running):
            return None
        view = View(
            waiting, self.running, self.pool.ledger(), self.budget, self.clock(), self.costs, self._cached,
            self._counters.served,
        )  # fmt: skip
        return self.policy.plan(view)

    def _cached(self, sample: Sample) -> list[int]:
        """Pages that are kept of a waiting sample's beginning. Its last token is computed in any case: something must
        be drawn from it."""
        return self.pool.match(sample.tokens[: sample.length - 1])

    def _admit(self, sample: Sample, pages: Sequence[int]) -> None:
        self.waiting.remove(sample)
        insort(self.running, sample, key=_rank)
        sample.table = self.pool.share(list(pages))
        sample.computed = len(pages) * self.pool.page_size
        if sample.request.started_s is None:
            sample.request.cached_tokens = sample.computed
            self.stats.prefix_queries += sample.request.prompt_tokens
            self.stats.prefix_hits += sample.computed
            self._counters.admit(sample.tenant, sample.length - sample.computed)
        sample.request.start(self.clock())

    def _launch(self, plan: Plan[Sample]) -> None:
        """Starts the step: pages, arrays, device. `computed` moves on here, what tokens were drawn comes later."""
        copies = []
        for sample, tokens in plan.chunks:
            copy = self.pool.extend(sample.table, sample.computed, tokens)
            if copy is not None:
                copies.append(copy)
        batch, rows = self._builder.build(plan.chunks)
        if copies:
            self.executor.copy_pages(copies)
        launched_s = self.clock()
        pending = self.executor.launch(batch)
        for sample, tokens in plan.chunks:
            sample.computed += tokens
        for sample in rows:
            if not sample.drawn:  # its prompt is complete, and of use to others from here on
                self._keep(sample)
        for leader in [sample for sample in rows if sample.width > 1]:
            self._part(leader)
        places = [sample.draw(row) for row, sample in enumerate(rows)]
        members = {*rows, *(sample for sample, _ in plan.chunks)}
        flight = Flight(pending, rows, places, members, Work.of(batch), launched_s)
        self._flights.append(flight)
        for sample in rows:
            if sample.drawn == sample.request.max_tokens:  # sure to end
                self.running.remove(sample)
                flight.leaving.append(sample)
        self.stats.steps += 1
        self.stats.tokens += len(batch.tokens)
        self.stats.copied_pages += len(copies)

    def _take_back(self) -> bool:
        """The most junior prompt to embed gives its pages back, if it is junior to all samples that run."""
        return bool(self.running) and self.embedder.give_way(self.running[-1].rank)

    def _admit_prompts(self) -> None:
        """Prompts to embed start, where there are pages for them beside what the others will want."""
        if self.embedder.waiting:
            ahead = min((samples[0].rank for samples in (self.waiting, self.swapped) if samples), default=None)
            self.embedder.admit(ahead, self._promised(), self.clock())

    def _embed(self) -> None:
        """Computes a chunk of the prompts to embed, and hands out what is complete."""
        started_s = self.clock()
        tokens, done = self.embedder.compute()
        for sample, vector in done:
            _tell(sample.request, sample.output.embed(vector))
        if tokens:
            self.told()
            self.stats.steps += 1
            self.stats.tokens += tokens
            self.stats.step_s += self.clock() - started_s

    def _process(self, ahead: int = 0) -> None:
        """Waits for the steps launched but the last `ahead` ones, and hands every row's token to its sample."""
        while len(self._flights) > ahead:
            flight = self._flights[0]
            result = self.executor.collect(flight.pending)
            flight.landed = True
            self._hand_out(flight, result)
            for sample in flight.leaving:
                self._release(sample)
            self._flights.popleft()

    def _hand_out(self, flight: Flight, result: StepResult) -> None:
        now_s = self.clock()
        self.stats.step_s += now_s - flight.launched_s
        if self.costs is not None:
            self.costs.observe(flight.work, now_s - max(flight.launched_s, self._landed_s))
        self._landed_s = now_s
        tokens, logprobs = result.token_ids.tolist(), result.logprobs.tolist()
        answered: Counter[str] = Counter()
        for row, (sample, place) in enumerate(zip(flight.rows, flight.places, strict=True)):
            if sample.output.completion:  # it ended while the step ran
                continue
            token, wanted = tokens[row], sample.request.params.logprobs
            logprob = None if wanted is None else _token_logprob(token, logprobs[row], result, row, wanted)
            sample.fill(place, token)
            event = sample.output.push(token, logprob, now_s, sample.cut_off)
            if event.completion:
                self._retire(sample)
            _tell(sample.request, event)
            answered[sample.request.tenant] += 1
        for tenant, count in answered.items():
            self._counters.answer(tenant, count)
        self.stats.drawn += answered.total()
        self.told()

    def _part(self, leader: Sample) -> None:
        """The prompt is in the cache: every other sample gets a table over the same pages, and runs on its own."""
        leader.width = 1
        for sample in leader.request.samples[1:]:
            sample.width = 1
            sample.computed = leader.computed
            sample.table = self.pool.fork(leader.table)
            insort(self.running, sample, key=_rank)

    def _preempt(self, sample: Sample) -> None:
        """Gives the pages back. What they held is moved out and back later, or computed again."""
        self.running.remove(sample)
        swap = self.executor.swap
        sample.swapped = swap.out(sample.table.pages) if swap else None
        self._release(sample)
        if sample.swapped is not None:
            insort(self.swapped, sample, key=_rank)
        else:
            sample.computed = 0
            sample.replays = swap is not None  # there, prompts and answers are not computed alike
            insort(self.waiting, sample, key=_rank)
            self.stats.replays += sample.replays
        self.stats.preemptions += 1

    def _swap_back(self) -> None:
        """Swapped samples run again, the most senior first, when they fit beside what those that run will want.

        Not before a more senior one that waits, which the policy admits: a sample for whose pages the host had no room
        waits to compute them again while juniors of it, its siblings even, lie swapped out. Back before it, they would
        take the pages that it waits for.
        """
        size = self.pool.page_size
        while self.swapped:
            sample = self.swapped[0]
            if self.waiting and self.waiting[0].rank < sample.rank:
                return
            promised = self._promised()
            places = self.budget.max_batch - sum(s.width for s in self.running)
            if sample.width > places or pages_for(sample.length, size) + promised > self.pool.free:
                return
            self.swapped.pop(0)
            self.pool.extend(sample.table, 0, sample.computed)
            if self.executor.swap is not None:
                self.executor.swap.back(sample.swapped, sample.table.pages)
            sample.swapped = None
            insort(self.running, sample, key=_rank)

    def _promised(self) -> int:
        """Pages that running samples will want: one to grow into, and the rest of their prompts."""
        size = self.pool.page_size
        return sum(1 + pages_for(s.length, size) - len(s.table) for s in self.running)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request's unfinished samples from outside."""
        for sample in list(request.samples):  # which is emptied with its last one
            if sample.output.completion is None:
                self._retire(sample)
                _tell(request, sample.output.end(reason))
        request.leave_queue()
        request.decide()

    def _retire(self, sample: Sample) -> None:
        """Takes a sample off the lists and frees its pages, which wait for a step in flight that uses them."""
        if sample.request.embeds:
            self.embedder.drop(sample)
            return
        for samples in (self.running, self.waiting, self.swapped):
            if sample in samples:
                samples.remove(sample)
        if sample.swapped is not None and self.executor.swap is not None:
            self.executor.swap.drop(sample.swapped)
            sample.swapped = None
        flights = [flight for flight in self._flights if not flight.landed and sample in flight.members]
        if not flights:
            self._release(sample)
        elif sample not in flights[-1].leaving:
            flights[-1].leaving.append(sample)

    def _release(self, sample: Sample) -> None:
        """Gives a sample's pages back; those that others may begin with are kept while there is room."""
        self._keep(sample)
        self.pool.release(sample.table)

    def _keep(self, sample: Sample) -> None:
        """Lets others begin with the pages that this sample has filled. Where prompts and answers are not computed
        alike, an answer's pages are not what the same tokens in a prompt would give."""
        alike = self.executor.swap is None
        tokens = sample.tokens[: sample.computed if alike else min(sample.computed, sample.request.prompt_tokens)]
        unknown = np.flatnonzero(tokens < 0)  # drawn in a step that is not processed yet
        self.pool.keep(sample.table, tokens[: unknown[0]] if len(unknown) else tokens)

    def _samples(self) -> Iterator[Sample]:
        """Those that wait or run."""
        return chain(self.waiting, self.running, self.swapped, self.embedder.waiting, self.embedder.running)

    def _leaving(self) -> Iterator[Sample]:
        """Those on no list whose pages are in use."""
        return chain.from_iterable(flight.leaving for flight in self._flights)

    def _requests(self) -> list[Request]:
        """Those with unfinished samples, each once."""
        unfinished = (s for s in chain(self._samples(), self._leaving()) if s.output.completion is None)
        return list(dict.fromkeys(sample.request for sample in unfinished))


def _tell(request: Request, event: StreamEvent) -> None:
    request.events(request, event)
    if event.completion:
        request.part()


def _rank(sample: Sample) -> tuple[int, int, int]:
    return sample.rank


def _token_logprob(token: int, logprob: float, result: StepResult, row: int, wanted: int) -> TokenLogprob:
    ids, values = result.top_ids[row, :wanted].tolist(), result.top_logprobs[row, :wanted].tolist()
    return TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
