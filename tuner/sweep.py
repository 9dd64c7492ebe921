"""A sweep: which task is next, candidates compiled ahead, measured one after the other, a record for each.

The next batch goes to the task from which the whole model should gain most: its share of the workload's time, times how
much of it a batch may still save, judged by the last batches and by the way to the floor (the gradient of Ansor's task
scheduler, Zheng et al. 2020).
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

from tilewright.schedules.records import Record, target_text, text_of
from tilewright.tuner.candidates import Candidate, Compilers, Failure
from tilewright.tuner.log import Log
from tilewright.tuner.measuring import Measurer, Timing
from tilewright.tuner.outcomes import Provenance, finished, now
from tilewright.tuner.search import Search
from tilewright.tuner.tasks import Key, Task

BATCH = 8
_SEARCHED = 0.9  # of the time; the rest is for measuring the winners once more
# A time under the floor says that data lie in a cache: then the floor is none, and says nothing of when to stop.
_NO_FLOOR = 1.05


@dataclass(frozen=True)
class Budget:
    """What a sweep may take, whichever ends first; None: no limit."""

    seconds: float | None = None
    trials: int | None = None


@dataclass
class Progress:
    """Where a task stands. last_gain: of the last batch, a part of the time before it. confirmed: the tile that was the
    best and has been measured once more. exhausted: whether the search knows of no more tiles."""

    task: Task
    measured: dict[str, Record] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    batches: int = 0
    last_gain: float = 1.0
    confirmed: str = ""
    exhausted: bool = False
    done: str = ""  # why nothing more is tried

    @property
    def best(self) -> Record | None:
        return min((r for r in self.measured.values() if r.us is not None), key=lambda r: r.us or 0.0, default=None)

    @property
    def default(self) -> Record | None:
        return self.measured.get(self.task.default_text)

    @property
    def default_us(self) -> float | None:
        return self.default.us if self.default else None

    @property
    def best_us(self) -> float | None:
        return self.best.us if self.best else None

    @property
    def fraction(self) -> float | None:
        return self.best.of_floor if self.best else None

    @property
    def failures(self) -> Counter[str]:
        """By kind."""
        return Counter(record.failure for record in self.measured.values() if record.failure)


@dataclass
class State:
    """Where a sweep stands, for those who show it."""

    tasks: list[Progress]
    budget: Budget
    started_s: float
    trials: int = 0
    running: str = ""

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def left(self) -> float:
        """The part of the budget, or of the candidates where that is less, that is left."""
        parts = [1.0]
        if self.budget.seconds:
            parts.append(1 - self.elapsed_s / self.budget.seconds)
        if self.budget.trials:
            parts.append(1 - self.trials / self.budget.trials)
        total = sum(p.task.size for p in self.tasks)
        open_ = sum(p.task.size - len(p.measured) for p in self.tasks if not p.done)
        parts.append(open_ / max(1, total))
        return max(0.0, min(parts))

    @property
    def left_s(self) -> float | None:
        """Seconds to the expected end; None where nothing is known yet."""
        spent = [self.budget.seconds - self.elapsed_s] if self.budget.seconds else []
        if self.trials:
            each = self.elapsed_s / self.trials
            open_ = sum(p.task.size - len(p.measured) for p in self.tasks if not p.done)
            spent.append(each * open_)
            if self.budget.trials:
                spent.append(each * (self.budget.trials - self.trials))
        return max(0.0, min(spent)) if spent else None

    @property
    def gain(self) -> float:
        """The part of measured tasks' time, weighted by the workload, that the best tiles save over the defaults."""
        known = [p for p in self.tasks if p.default_us and p.best_us]
        before = sum(_time_us(p, p.default_us or 0.0) for p in known)
        return 1 - sum(_time_us(p, p.best_us or 0.0) for p in known) / before if before else 0.0

    @property
    def failures(self) -> Counter[str]:
        return sum((p.failures for p in self.tasks), Counter())


def _time_us(progress: Progress, us: float) -> float:
    """What a task takes of the workload's average step."""
    return progress.task.load_us * us / progress.task.floor_us


@dataclass
class Sweep:
    """tasks: that can be measured. ahead: whether candidates are compiled while others are measured, as they may be
    where the processor is not what is measured. observe: called at every change."""

    tasks: Sequence[Task]
    log: Log
    compilers: Compilers
    measurer: Measurer
    search: Search
    provenance: Provenance
    budget: Budget
    until: float = 0.95
    ahead: bool = False
    observe: Callable[[State], None] = lambda state: None

    def __post_init__(self) -> None:
        self.state = State([Progress(task) for task in self.tasks], self.budget, time.monotonic())
        self._defaults: dict[Key, Future[Candidate | Failure]] = {}
        self._queue: deque[tuple[Progress, Any, Future[Candidate | Failure]]] = deque()
        self._resume()

    def _resume(self) -> None:
        """What earlier sweeps left, for the same space, is measured."""
        by_key = {p.task.key: p for p in self.state.tasks}
        for record in self.log.records:
            progress = by_key.get((record.schedule, record.facts, record.rows))
            task = progress.task if progress else None
            if progress and task and record.space == task.space_hash and record.target == target_text(task.target):
                progress.measured[record.tile] = record
                progress.asked.add(record.tile)
        for progress in self.state.tasks:
            self._settle(progress)

    def run(self) -> State:
        """Until the budget is spent or nothing is left to try. What was measured is in the log, whatever ends it."""
        self.observe(self.state)
        while not self._spent(_SEARCHED):
            self._fill()
            if not self._queue:
                break
            progress, tile, future = self._queue.popleft()
            if not progress.done:
                self._try(progress, tile, future)
        for *_, future in self._queue:
            future.cancel()
        self._confirm()
        self.state.running = ""
        self.observe(self.state)
        return self.state

    def _spent(self, part: float) -> bool:
        """Whether that part of the time, or all trials, are gone."""
        seconds, trials = self.budget.seconds, self.budget.trials
        late = seconds is not None and self.state.elapsed_s >= part * seconds
        return late or (trials is not None and self.state.trials >= trials)

    # ---- what is next ------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Keeps candidates in the queue: a batch ahead of the one that is measured, or only when it has run empty."""
        while len(self._queue) <= (BATCH if self.ahead else 0):
            progress = self._next()
            if progress is None:
                return
            self._ask(progress)
        if not self.ahead:
            wait([future for *_, future in self._queue])

    def _next(self) -> Progress | None:
        open_ = [p for p in self.state.tasks if not p.done and not p.exhausted and len(p.asked) < p.task.size]
        return max(open_, key=lambda p: (self._expected_gain(p), p.task.key), default=None)

    def _expected_gain(self, progress: Progress) -> float:
        """Microseconds of the workload's average step that the next batch should save."""
        task, best_us = progress.task, progress.best_us
        if best_us is None:
            return task.load_us  # untried: as if it stood at half of its floor
        to_floor = 1 - task.floor_us / best_us if best_us > task.floor_us else 0.1
        forward = to_floor / (1 + progress.batches)
        return _time_us(progress, best_us) * 0.5 * (progress.last_gain + forward)

    def _ask(self, progress: Progress) -> None:
        """A batch of a task into the queue."""
        task = progress.task
        count = min(BATCH, task.size - len(progress.asked))
        tiles = self.search.propose(task, progress.measured, progress.asked, count)
        progress.batches += 1
        progress.last_gain *= 0.5
        if not tiles:  # of a space that nobody can count
            progress.exhausted = True
            self._settle(progress)
        for tile in tiles:
            progress.asked.add(text_of(tile))
            self._queue.append((progress, tile, self._compiled(task, tile)))

    def _compiled(self, task: Task, tile: Any) -> "Future[Candidate | Failure]":
        if tile != task.space[0]:
            return self.compilers.submit(task.schedule, task.facts, tile, task.target)
        return self._default(task)

    def _default(self, task: Task) -> "Future[Candidate | Failure]":
        if task.key not in self._defaults:
            submitted = self.compilers.submit(task.schedule, task.facts, task.space[0], task.target)
            self._defaults[task.key] = submitted
        return self._defaults[task.key]

    # ---- one candidate -----------------------------------------------------------------------------------------------

    def _try(self, progress: Progress, tile: Any, future: "Future[Candidate | Failure]") -> None:
        """Measures a candidate that has not been measured."""
        before = progress.best_us
        self._measure(progress, tile, future)
        now = progress.best_us
        if before and now and now < before:
            progress.last_gain = max(progress.last_gain, 1 - now / before)
        self.state.trials += 1
        self._settle(progress)
        self.observe(self.state)

    def _measure(self, progress: Progress, tile: Any, future: "Future[Candidate | Failure]") -> None:
        """Leaves a record of a candidate."""
        task = progress.task
        self.state.running = f"{task.name}: {tile}"
        self.observe(self.state)
        outcome: Candidate | Timing | Failure = future.result()
        default = self._default(task).result()
        if isinstance(default, Failure):
            outcome = default
        elif isinstance(outcome, Candidate):
            outcome = self.measurer.measure(task.problem, default, outcome)
        assert not isinstance(outcome, Candidate)
        text = text_of(tile)
        known = progress.measured.get(text)
        blank = replace(template(task, self.provenance), trial=known.trial if known else len(progress.measured) + 1)
        record = finished(blank, text, outcome, known_floor_us(task), now())
        self.log.add([record])
        self.search.learn(record)
        progress.measured[record.tile] = record

    def _confirm(self) -> None:
        """Measures the default and the best of each task once more, one after the other: the best of many is in part
        the luckiest, and a machine changes during a sweep."""
        for progress in self.state.tasks:
            while progress.best and progress.confirmed != progress.best.tile != progress.task.default_text:
                if self.budget.seconds is not None and self.state.elapsed_s >= self.budget.seconds:
                    return
                progress.confirmed = progress.best.tile
                for tile in (progress.task.space[0], progress.task.tile_of(progress.best.tile)):
                    self._measure(progress, tile, self._compiled(progress.task, tile))

    def _settle(self, progress: Progress) -> None:
        """Ends a task where there is nothing more to win, or nothing to go by."""
        default = progress.default
        if default is not None and default.us is None:
            progress.done = f"the default tile failed ({default.failure}: {default.detail})"
        elif len(progress.measured) >= progress.task.size or (
            progress.exhausted and len(progress.measured) == len(progress.asked)
        ):
            progress.done = "all tiles tried"
        elif progress.fraction and self.until <= progress.fraction <= _NO_FLOOR:
            progress.done = f"at {progress.fraction:.0%} of the floor"


def template(task: Task, by: Provenance) -> Record:
    """A record of a task without a tile and an outcome."""
    size, operations = task.work(task.rows)
    return Record(
        device=by.device,
        target=target_text(task.target),
        schedule=task.schedule.name,
        facts=task.facts_text,
        rows=task.rows,
        space=task.space_hash,
        tile="",
        bytes=size,
        operations=operations,
        driver=by.driver,
        versions=by.versions,
    )


def known_floor_us(task: Task) -> float | None:
    """The task's floor, where the device's ceilings are known."""
    return task.floor_us if task.target.bandwidth_gbs is not None else None


def present_us(tasks: Sequence[Task], records: Sequence[Record]) -> Mapping[Key, float]:
    """The best time known of each task, of its space of today."""
    spaces = {task.key: task.space_hash for task in tasks}
    best: dict[Key, float] = {}
    for record in records:
        key = record.schedule, record.facts, record.rows
        if record.us is not None and spaces.get(key) == record.space:
            best[key] = min(best.get(key, record.us), record.us)
    return best
