"""A compile's progress: bars on a terminal, a few plain lines anywhere else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from tilewright import console
from tilewright.compiler.progress import Progress

Report = Callable[[Progress], None]

_LABELS = {
    "download": "downloading",
    "passes": "passes",
    "kernels": "kernels compiled",
    "weights": "weights packed",
    "link": "linking",
    "seal": "sealing",
}
_PLAIN_INTERVAL_S = 5.0


@contextmanager
def compile_progress() -> Iterator[Report]:
    """Gives the function to report to; shows what it is told on stderr until the block ends."""
    stream = console.err()
    if not stream.is_terminal:
        yield PlainProgress(stream)
        return
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
        console=stream,
    )
    with bars:
        yield _BarProgress(bars)


class _BarProgress:
    """One bar a stage, added when the stage is first heard of."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, object] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(_LABELS[progress.stage], count="", detail="")
        detail = progress.detail if progress.done < progress.total else ""
        self._bars.update(
            self._tasks[progress.stage],  # type: ignore[arg-type]
            completed=progress.done,
            total=progress.total,
            count=_count(progress),
            detail=_plain(detail),
        )


class PlainProgress:
    """A line when a stage starts and ends, and every few seconds in between."""

    def __init__(self, stream: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stage: str | None = None
        self._started = self._printed = 0.0

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if progress.stage != self._stage:
            self._stage, self._started, self._printed = progress.stage, now, now
            if progress.done < progress.total:
                if progress.total > 1:  # what is one thing is told when it is done
                    self._print(progress, now)
                return
        if progress.done == progress.total or now - self._printed >= _PLAIN_INTERVAL_S:
            self._printed = now
            self._print(progress, now)

    def _print(self, progress: Progress, now: float) -> None:
        line = f"{_LABELS[progress.stage]}: {_count(progress)}"
        elapsed = now - self._started
        if progress.done == progress.total:
            line += f" in {console.duration(elapsed)}"
        elif progress.done and elapsed:
            remaining = elapsed / progress.done * (progress.total - progress.done)
            line += f" after {console.duration(elapsed)}, about {console.duration(remaining)} left"
        self._stream.print(line, markup=False)


def _count(progress: Progress) -> str:
    """Downloads count bytes, all else whole things."""
    if progress.stage == "download":
        return f"{console.size(progress.done)} of {console.size(progress.total)}"
    return f"{progress.done} of {progress.total}"


def _plain(text: str) -> str:
    """Text that rich does not read as markup."""
    return text.replace("[", r"\[")
