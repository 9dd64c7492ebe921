"""A bundle of a model's tasks: which candidates, compiled here."""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from tilewright.compiler.targets.base import Target
from tilewright.schedules.records import text_of
from tilewright.tuner.bundle import Bundled, write, writing
from tilewright.tuner.candidates import Candidate, Compilers
from tilewright.tuner.outcomes import Provenance
from tilewright.tuner.search import Search
from tilewright.tuner.sweep import known_floor_us, template
from tilewright.tuner.tasks import Task

PER_TASK = 16  # candidates, where no number is asked for


def export(
    file: Path,
    target: Target,
    tasks: Sequence[Task],
    search: Search,
    compilers: Compilers,
    versions: str,
    trials: int | None,
    done: Callable[[int, int], None] = lambda count, total: None,
) -> tuple[int, int]:
    """Compiles candidates and writes the bundle. trials: of all tasks together. done(compiled, all) is called as they
    are ready. Returns how many candidates it holds and how many did not compile."""
    with writing(file):  # said before anything is compiled
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    each = PER_TASK if trials is None else max(1, trials // max(1, len(tasks)))
    chosen = {task.key: _chosen(task, search, each) for task in tasks}
    futures = {
        compilers.submit(task.schedule, task.facts, tile, task.target): (task, tile)
        for task in tasks
        for tile in chosen[task.key]
    }
    compiled: dict[tuple[Any, str], Candidate] = {}
    for count, future in enumerate(as_completed(futures), 1):
        task, tile = futures[future]
        outcome = future.result()
        if isinstance(outcome, Candidate):
            compiled[task.key, text_of(tile)] = outcome
        done(count, len(futures))
    blank = Provenance("", "", versions)
    entries = []
    for task in tasks:
        texts = [text_of(tile) for tile in chosen[task.key]]
        tiles = {text: compiled[task.key, text] for text in texts if (task.key, text) in compiled}
        if task.default_text in tiles:
            entries.append(Bundled(task.problem, template(task, blank), known_floor_us(task), tiles))
    write(file, target, entries)
    return sum(len(entry.tiles) for entry in entries), len(futures) - len(compiled)


def _chosen(task: Task, search: Search, count: int) -> list[Any]:
    chosen: list[Any] = []
    taken: set[str] = set()
    while len(chosen) < count:
        found = search.propose(task, {}, taken, count - len(chosen))
        if not found:
            break
        chosen += found
        taken |= {text_of(tile) for tile in found}
    return chosen
