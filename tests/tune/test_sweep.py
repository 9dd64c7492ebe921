"""Sweeps over planted candidates: what fails costs one candidate, and the best is found."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tune import planted
from tests.tune.planted import PlantedTile
from tests.tune.sweep_planted import BY
from tilewright.schedules.records import text_of
from tilewright.tuner.candidates import Candidate, Compilers, Failure
from tilewright.tuner.log import Log
from tilewright.tuner.measuring import Measurer, Timing
from tilewright.tuner.search import ModelSearch, RandomSearch
from tilewright.tuner.sweep import Budget, State, Sweep
from tilewright.tuner.tasks import Task


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    made = Compilers(1)
    yield made
    made.close()


@pytest.fixture
def measurer() -> Iterator[Measurer]:
    made = Measurer("cpu", {"TVM_NUM_THREADS": "1"}, limit_s=4.0)
    yield made
    made.close()


def test_each_kind_of_failure_is_one_record(compilers: Compilers, measurer: Measurer, tmp_path: Path) -> None:
    task = planted.task((300, 100), planted.PLANTED)
    log = Log(tmp_path, BY.device)
    state = Sweep([task], log, compilers, measurer, RandomSearch(), BY, Budget()).run()
    [progress] = state.tasks
    assert progress.done == "all tiles tried" and state.trials == len(task.space)
    assert progress.failures == Counter(dict.fromkeys(planted.PLANTED, 1))
    assert progress.best is not None and progress.best.tile == text_of(PlantedTile(100))
    assert progress.default_us and progress.best_us
    assert state.gain == pytest.approx(1 - progress.best_us / progress.default_us) and 0.2 < state.gain < 0.7
    details = {record.failure: record.detail for record in log.records if record.failure}
    assert details["wrong"] == "y is off by 0.5, more than 0.0001"
    assert details["crash"] == "the process ended by SIGABRT"
    assert details["hang"] == "no answer in 4 s"
    assert "bad_alloc" in details["memory"] and "planted" in details["compile"]


def test_a_result_with_other_bits_is_wrong(compilers: Compilers, measurer: Measurer) -> None:
    """Within the tolerance of the reference, but not what the default gives."""
    task = planted.task((100, 100))
    default, near = (build(compilers, task, tile) for tile in (PlantedTile(100), PlantedTile(100, "near")))
    assert isinstance(measurer.measure(task.problem, default, default), Timing)
    assert measurer.measure(task.problem, default, near) == Failure("wrong", "gives other bits than the default tile")


def build(compilers: Compilers, task: Task, tile: PlantedTile) -> Candidate:
    candidate = compilers.submit(task.schedule, task.facts, tile, task.target).result()
    assert isinstance(candidate, Candidate), candidate
    return candidate


def test_a_candidate_that_does_not_compile_in_time_is_given_up() -> None:
    late = Compilers(1, limit_s=0.05)
    try:
        task = planted.task((500,))
        outcome = late.submit(task.schedule, task.facts, task.space[0], task.target).result()
        assert outcome == Failure("compile", "not compiled in 0.05 s")
    finally:
        late.close()


# ---- the order of work, by a machine that answers at once ------------------------------------------------------------


class Instant:
    """Compilers and measurer in one: a candidate takes what its tile says. drifts: added at each measurement."""

    def __init__(self, drift_us: float = 0.0) -> None:
        self.asked: list[tuple[int, PlantedTile]] = []
        self._drift_us = drift_us

    def submit(self, schedule: Any, facts: Any, tile: PlantedTile, target: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(Candidate(str(tile.sleep_us), (tile.fault,), (), ()))
        return future

    def measure(self, problem: Any, default: Candidate, candidate: Candidate) -> Timing | Failure:
        us, [fault] = float(candidate.library), candidate.parts
        self.asked.append((problem.rows, PlantedTile(int(us), fault)))
        if fault:
            return Failure(fault, "planted")
        us += self._drift_us * len(self.asked)
        return Timing(us, (us, us))


def sweep(tasks: list[Task], logs: Path, machine: Instant, budget: Budget | None = None, **options: Any) -> State:
    search = options.pop("search", None) or RandomSearch()
    log = Log(logs, BY.device)
    return Sweep(tasks, log, machine, machine, search, BY, budget or Budget(), **options).run()  # type: ignore[arg-type]


MANY = (900, *range(500, 800, 10))


def test_the_task_with_the_most_to_gain_is_first(tmp_path: Path) -> None:
    machine = Instant()
    tasks = [planted.task(MANY, rows=rows, load_us=load) for rows, load in ((1, 1.0), (2, 50.0), (3, 5.0))]
    sweep(tasks, tmp_path, machine, Budget(trials=20))
    rows = [rows for rows, _ in machine.asked[:20]]
    assert rows[0] == 2 and set(rows[:8]) == {2}
    assert Counter(rows).most_common(1)[0][0] == 2


def test_a_budget_of_trials_is_kept_and_the_next_sweep_goes_on(tmp_path: Path) -> None:
    tasks = [planted.task(MANY)]
    first = sweep(tasks, tmp_path, Instant(), Budget(trials=10))
    assert first.trials == 10 and first.left == pytest.approx(0.0)
    machine = Instant()
    second = sweep(tasks, tmp_path, machine)
    assert second.trials == len(MANY) - 10
    assert second.tasks[0].best_us == 500 and second.tasks[0].default_us == 900
    assert sweep(tasks, tmp_path, Instant()).trials == 0


def test_a_budget_of_time_is_kept(tmp_path: Path) -> None:
    class Slow(Instant):
        def measure(self, *arguments: Any) -> Timing | Failure:
            time.sleep(0.02)
            return super().measure(*arguments)

    state = sweep([planted.task(MANY)], tmp_path, Slow(), Budget(seconds=0.3))
    assert 3 < state.trials < len(MANY) - 8 and state.elapsed_s < 1.0
    assert state.tasks[0].confirmed  # the last of the time is for the winner


def test_a_task_at_its_floor_is_done(tmp_path: Path) -> None:
    task = known_ceiling(planted.task(MANY, rows=1), floor_us=500.0)
    state = sweep([task], tmp_path, Instant(), until=0.95)
    [progress] = state.tasks
    assert progress.done.endswith("of the floor") and 0.95 <= (progress.fraction or 0) <= 1.05
    assert len(progress.measured) < len(task.space)


def test_a_floor_that_is_none_stops_nothing(tmp_path: Path) -> None:
    task = known_ceiling(planted.task(MANY, rows=1), floor_us=2000.0)
    assert sweep([task], tmp_path, Instant()).tasks[0].done == "all tiles tried"


def known_ceiling(task: Task, floor_us: float) -> Task:
    size, _ = task.work(1)
    return replace(task, target=replace(task.target, bandwidth_gbs=size / floor_us / 1e3))


def test_a_default_that_fails_ends_its_task(tmp_path: Path) -> None:
    task = planted.task((500,), ["crash"])
    schedule = planted.Planted((PlantedTile(500, "crash"), PlantedTile(400)))
    task = replace(task, schedule=schedule)
    machine = Instant()
    [progress] = sweep([task, planted.task((300, 200), rows=2)], tmp_path, machine).tasks[:1]
    assert progress.done == "the default tile failed (crash: planted)" and len(progress.measured) == 1
    assert (2, PlantedTile(200)) in machine.asked


def test_the_winner_is_measured_once_more_beside_the_default(tmp_path: Path) -> None:
    machine = Instant(drift_us=1.0)  # the machine slows down: the default, measured first, looks too good
    state = sweep([planted.task((500, 450, 498))], tmp_path, machine)
    assert [tile.sleep_us for _, tile in machine.asked[-2:]] == [500, 450]
    assert state.tasks[0].default_us == 504 and state.tasks[0].best_us == 455


def test_candidates_are_compiled_ahead_on_a_gpu_alone(tmp_path: Path) -> None:
    for ahead in (False, True):
        task = planted.task(MANY, load_us=2.0)
        state = sweep([task], tmp_path / str(ahead), Instant(), ahead=ahead, search=ModelSearch())
        assert state.tasks[0].best_us == 500 and state.trials == len(MANY)
