"""How a sweep is shown: a live table on a terminal, plain lines anywhere else."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tilewright import console

if TYPE_CHECKING:
    from tilewright.tuner.sweep import Progress, State
    from tilewright.tuning import Plan

_PLAIN_INTERVAL_S = 10.0
_MOST_ROWS = 24  # of a live table


@contextmanager
def sweep_display() -> "Iterator[Callable[[State], None]]":
    """Gives the function to report to; shows what it is told on stderr until the block ends."""
    stream = console.err()
    if not stream.is_terminal:
        yield PlainSweep(stream)
        return
    with Live(console=stream, refresh_per_second=4, transient=True) as live:
        yield lambda state: live.update(_live(state))


class PlainSweep:
    """A line when a task is done, and every few seconds."""

    def __init__(self, stream: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._printed_s = clock()
        self._done: set[Any] = set()

    def __call__(self, state: "State") -> None:
        for progress in state.tasks:
            if progress.done and progress.task.key not in self._done:
                self._done.add(progress.task.key)
                self._print(f"{progress.task.name}: {_outcome(progress)}; {progress.done}")
        now_s = self._clock()
        if now_s - self._printed_s >= _PLAIN_INTERVAL_S:
            self._printed_s = now_s
            self._print(_line(state))

    def _print(self, line: str) -> None:
        self._stream.print(line, markup=False)


def _live(state: "State") -> Group:
    running = Text(f"running  {state.running}", style="dim", no_wrap=True)
    return Group(Text(_line(state)), running, _table(state, _MOST_ROWS))


def _line(state: "State") -> str:
    open_ = sum(not progress.done for progress in state.tasks)
    parts = [
        f"{state.trials} trials in {console.duration(state.elapsed_s)}",
        f"{open_} of {len(state.tasks)} tasks open",
        f"whole model {_less(state.gain)}",
    ]
    if state.failures:
        parts.append("failed: " + _counts(state.failures))
    if state.left_s is not None:
        parts.append(f"about {console.duration(state.left_s)} left")
    return ", ".join(parts)


def _counts(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(failures.items()))


def _less(gain: float) -> str:
    return f"{-gain:+.1%}"


def _outcome(progress: "Progress") -> str:
    if progress.best_us is None:
        return "no time"
    before = f", default {progress.default_us:.4g}" if progress.default_us else ""
    return f"best {progress.best_us:.4g} us{before}"


def _table(state: "State", most: int) -> Table:
    numeric = ("share", "floor us", "default us", "best us", "of floor", "tried")
    table = console.table("Tasks", "task", *numeric, "failed", "", numeric=numeric)
    table.title = None
    from tilewright.tuner.tasks import weights

    times = {p.task.key: p.best_us for p in state.tasks if p.best_us}
    shares = weights([p.task for p in state.tasks], times)
    rows = sorted(state.tasks, key=lambda p: -shares[p.task.key])
    for progress in rows[:most]:
        table.add_row(*_row(progress, shares[progress.task.key]))
    if len(rows) > most:
        table.add_row(f"and {len(rows) - most} more", *[""] * (len(numeric) + 2))
    return table


def _row(progress: "Progress", share: float) -> tuple[str, ...]:
    task = progress.task
    return (
        task.name,
        f"{share:.1%}",
        f"{task.floor_us:.3g}",
        "" if progress.default_us is None else f"{progress.default_us:.4g}",
        "" if progress.best_us is None else f"{progress.best_us:.4g}",
        "" if progress.fraction is None else f"{progress.fraction:.0%}",
        f"{len(progress.measured)}/{task.size}",
        _counts(progress.failures),
        progress.done,
    )


def show_sweep(state: "State") -> None:
    """The end of a sweep, on stdout."""
    table = _table(state, len(state.tasks))
    table.title = _line(state)
    console.show(table)


def show_plan(plan: "Plan", times_us: Mapping[Any, float]) -> None:
    """What there is to tune, with floor, present time and share of the workload, on stdout."""
    from tilewright.tuner.tasks import weights

    numeric = ("share", "calls", "tiles", "floor us", "now us", "of floor")
    table = console.table(f"Tasks of {plan.target.name}", "task", *numeric, "", numeric=numeric)
    tasks = (*plan.tasks, *plan.skipped)
    shares = weights(tasks, times_us)
    for task in sorted(tasks, key=lambda t: (-shares[t.key], t.key)):
        now_us = times_us.get(task.key)
        known = plan.target.bandwidth_gbs is not None
        table.add_row(
            task.name,
            f"{shares[task.key]:.1%}",
            f"{task.calls:.3g}",
            str(task.size),
            f"{task.floor_us:.3g}{'' if known else '?'}",
            "" if now_us is None else f"{now_us:.4g}",
            f"{task.floor_us / now_us:.0%}" if now_us and known else "",
            _skipped(task),
        )
    console.show(table)
    if plan.target.bandwidth_gbs is None:
        console.note("floors are guesses: run tilewright doctor --measure on the machine for its ceilings")


def _skipped(task: Any) -> str:
    if task.why_not:
        return str(task.why_not)
    if task.size == 1:
        return "one tile alone"
    return "" if task.load_us else "not in the workload"
