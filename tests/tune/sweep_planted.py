"""A sweep over planted tiles, as a process that can be killed: python -m tests.tune.sweep_planted LOGS TILES."""

import sys
from pathlib import Path

from tilewright.compiler.without_torch import without_torch

with without_torch():
    from tests.tune import planted
from tilewright.tuner.candidates import Compilers
from tilewright.tuner.log import Log, locked
from tilewright.tuner.measuring import Measurer
from tilewright.tuner.outcomes import Provenance
from tilewright.tuner.search import RandomSearch
from tilewright.tuner.sweep import Budget, Sweep
from tilewright.tuner.tasks import Task

BY = Provenance("Planted, 1 core", "", "{}")
FOLDER = "planted-1-core"
BEST_US = 100


def tasks(tiles: int) -> list[Task]:
    """Two, of so many tiles each."""
    sleeps_us = (500, BEST_US, *range(200, 200 + 5 * (tiles - 2), 5))
    return [planted.task(sleeps_us, rows=rows, load_us=load_us) for rows, load_us in ((4, 1.0), (5, 3.0))]


def main(logs: Path, tiles: int) -> None:
    compilers, measurer = Compilers(1), Measurer("cpu", {"TVM_NUM_THREADS": "1"})
    try:
        with locked(logs):
            Sweep(tasks(tiles), Log(logs, BY.device), compilers, measurer, RandomSearch(), BY, Budget()).run()
    finally:
        compilers.close()
        measurer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
