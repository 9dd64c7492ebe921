"""The serving loop: receive, schedule, step, process. One thread turns it; any thread may submit and cancel.

It knows no text, no threads and no clock but the one it is given, so tests and simulations turn it by hand.
"""

import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

from tilewright.runtime.batch import BatchBuilder
from tilewright.runtime.kv_cache import PagePool
from tilewright.runtime.request import Request, Sample
from tilewright.runtime.scheduler.policy import Budget, Plan, Policy, View
from tilewright.runtime.types import Costs, EngineError, Executor, FinishReason, StepResult, TokenLogprob

Clock = Callable[[], float]


@dataclass
class Stats:
    """Counts since the start."""

    steps: int = 0
    tokens: int = 0
    drawn: int = 0
    preemptions: int = 0
    copied_pages: int = 0


@dataclass
class EngineCore:
    """Turns requests into steps of `executor` as `policy` plans them.

    An exception out of a turn ends every request with "error" and leaves the core dead: `failure` says why.
    """

    executor: Executor
    budget: Budget
    policy: Policy
    costs: Costs | None = None
    clock: Clock = time.perf_counter
    waiting: list[Sample] = field(default_factory=list)
    running: list[Sample] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        limits = self.executor.limits
        self.pool = PagePool(limits.num_pages, limits.page_size)
        self._builder = BatchBuilder(limits.page_size, limits.max_context)
        self._inbox: deque[tuple[str, Request]] = deque()
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
        return bool(self._inbox or self.waiting or self.running)

    # -- from the loop's thread --

    def turn(self) -> None:
        """One round of the loop."""
        try:
            self._receive()
            plan = self._schedule()
            if plan is not None:
                rows, result = self._step(plan)
                self._process(rows, result)
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Ends every request with "error", and lets no other in."""
        with self._door:
            self.failure = error
        for request in [*self._requests(), *(request for _, request in self._inbox)]:
            self._finish(request, "error")

    def check_invariants(self) -> None:
        """Raises AssertionError unless the books are right. Between turns; when idle, every page must be free."""
        self.pool.check(sample.table for sample in self.running)
        assert not any(len(sample.table) or sample.computed for sample in self.waiting), "a waiting sample holds pages"
        ranks = [sample.rank for sample in chain(self.waiting, self.running)]
        assert len(set(ranks)) == len(ranks), "a sample is listed twice"
        for samples in (self.waiting, self.running):
            assert samples == sorted(samples, key=_rank), "samples are not in order of seniority"
        assert sum(sample.width for sample in self.running) <= self.budget.max_batch, "more rows than the batch has"
        for sample in chain(self.waiting, self.running):
            assert sample.output.completion is None, "a finished sample is still listed"
            assert 0 <= sample.computed < sample.length, "a sample has nothing left to compute"
            assert sample.length == sample.request.prompt_tokens + sample.drawn, "a draw was lost"

    def _receive(self) -> None:
        while self._inbox:
            kind, request = self._inbox.popleft()
            if kind == "cancel":
                self._finish(request, "cancelled")
            elif not request.finished:
                insort(self.waiting, request.samples[0], key=_rank)
        now_s = self.clock()
        for request in self._requests():
            if request.deadline_s <= now_s:
                self._finish(request, "deadline")

    def _schedule(self) -> Plan[Sample] | None:
        if not (self.waiting or self.running):
            return None
        now_s = self.clock()
        view = View(self.waiting, self.running, self.pool.ledger(), self.budget, now_s, self.costs)
        plan = self.policy.plan(view)
        if not plan.chunks:
            raise EngineError(f"{self.policy} computes nothing with {len(self.waiting)} requests waiting")
        for sample in plan.preempt:
            self._preempt(sample)
        for sample in plan.admit:
            self.waiting.remove(sample)
            insort(self.running, sample, key=_rank)
            sample.request.start(now_s)
        return plan

    def _step(self, plan: Plan[Sample]) -> tuple[list[Sample], StepResult]:
        """Launches the step: pages, arrays, device. `computed` moves on here, tokens come with the result."""
        copies = []
        for sample, tokens in plan.chunks:
            copy = self.pool.extend(sample.table, sample.computed, tokens)
            if copy is not None:
                copies.append(copy)
        batch, rows = self._builder.build(plan.chunks)
        if copies:
            self.executor.copy_pages(copies)
        result = self.executor.step(batch)
        for sample, tokens in plan.chunks:
            sample.computed += tokens
        self.stats.steps += 1
        self.stats.tokens += len(batch.tokens)
        self.stats.copied_pages += len(copies)
        return rows, result

    def _process(self, rows: list[Sample], result: StepResult) -> None:
        """Hands every row's token to its sample; lets the samples of a finished prompt part."""
        now_s = self.clock()
        for leader in [sample for sample in rows if sample.width > 1]:
            self._part(leader)
        tokens, logprobs = result.token_ids.tolist(), result.logprobs.tolist()
        for row, sample in enumerate(rows):
            token, wanted = tokens[row], sample.request.params.logprobs
            logprob = None if wanted is None else _token_logprob(token, logprobs[row], result, row, wanted)
            sample.append(token)
            event = sample.output.push(token, logprob, now_s)
            if event.completion:
                self._retire(sample)
            sample.request.events(sample.request, event)
        self.stats.drawn += len(rows)

    def _part(self, leader: Sample) -> None:
        """The prompt is in the cache: every other sample gets a table over the same pages, and runs on its own."""
        leader.width = 1
        for sample in leader.request.samples[1:]:
            sample.width = 1
            sample.computed = leader.computed
            sample.table = self.pool.fork(leader.table)
            insort(self.running, sample, key=_rank)

    def _preempt(self, sample: Sample) -> None:
        """Gives the pages back; the tokens stay and are computed again later."""
        self.running.remove(sample)
        self.pool.release(sample.table)
        sample.computed = 0
        insort(self.waiting, sample, key=_rank)
        self.stats.preemptions += 1

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request's unfinished samples from outside."""
        for sample in request.samples:
            if sample.output.completion is None:
                self._retire(sample)
                request.events(request, sample.output.end(reason))
        request.leave_queue()

    def _retire(self, sample: Sample) -> None:
        """Takes a sample off the lists and frees its pages."""
        if sample in self.running:
            self.running.remove(sample)
        elif sample in self.waiting:
            self.waiting.remove(sample)
        self.pool.release(sample.table)

    def _requests(self) -> list[Request]:
        """Those that wait or run, each once."""
        return list(dict.fromkeys(sample.request for sample in chain(self.waiting, self.running)))


def _rank(sample: Sample) -> tuple[int, int, int]:
    return sample.rank


def _token_logprob(token: int, logprob: float, result: StepResult, row: int, wanted: int) -> TokenLogprob:
    ids, values = result.top_ids[row, :wanted].tolist(), result.top_logprobs[row, :wanted].tolist()
    return TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
