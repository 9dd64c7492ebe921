"""A sweep is killed at random moments, again and again: its records stay whole, and the last run finds the best."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tune import sweep_planted
from tests.tune.planted import PlantedTile
from tilewright.compiler import env
from tilewright.schedules.records import Record, read_file, text_of

ROOT = Path(__file__).parents[2]
MOMENTS = ("starting", "working", "rewriting")


class Victim:
    """A sweep of two tasks of so many tiles in a process of its own, which leaves its records in `folder`."""

    def __init__(self, folder: Path, tiles: int) -> None:
        self.file = folder / "logs" / sweep_planted.FOLDER / "planted.jsonl"
        self._aside = self.file.parent / ".planted.new"
        self._command = [sys.executable, "-m", "tests.tune.sweep_planted", str(folder / "logs"), str(tiles)]
        self._environment = {**os.environ, env.CACHE_DIR: str(folder / "cache")}  # by which its workers are known too
        self._process: subprocess.Popen[bytes] | None = None
        self._to_first_record_s = 0.0

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, cwd=ROOT, env=self._environment, start_new_session=True)

    def reach(self, moment: str, dice: random.Random) -> None:
        """Waits for a random instant: from the start to where a first new record is due; after that record; or while
        the file that shall take the records' place is written. The second kind comes first: it measures the first."""
        if moment == "starting":
            time.sleep(dice.uniform(0, self._to_first_record_s))
            return
        start_s = time.monotonic()
        self._wait_for_writing(self.file)
        self._to_first_record_s = time.monotonic() - start_s
        if moment == "working":
            time.sleep(dice.uniform(0, 0.4))
        else:
            self._wait_for_writing(self._aside)

    def _wait_for_writing(self, file: Path) -> None:
        before = _written_ns(file)
        while _written_ns(file) in (None, before):
            assert self._running, "it ended of itself"
            time.sleep(0.0002)

    @property
    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Once this returns, its workers have gone with it."""
        assert self._running, "it ended of itself"
        self.end()
        limit_s = time.monotonic() + 20
        while left := self._left():
            assert time.monotonic() < limit_s, f"processes {left} stayed"
            time.sleep(0.01)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def finish(self) -> int:
        """The exit status."""
        assert self._process is not None
        return self._process.wait()

    def _left(self) -> list[int]:
        mark = f"{env.CACHE_DIR}={self._environment[env.CACHE_DIR]}".encode()
        return [int(place.name) for place in Path("/proc").glob("[0-9]*") if mark in _environ(place)]

    def records(self) -> dict[tuple[int, str], Record]:
        """By rows and tile. Each line is one."""
        if not self.file.exists():
            return {}
        records, others, problems = read_file(self.file)
        assert not others and not problems
        return {(record.rows, record.tile): record for record in records}


def _written_ns(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _environ(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # another's, or gone
        return b""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_sweep_that_is_killed_goes_on(kills: int, tmp_path: Path) -> None:
    """Each kill loses no record and leaves no process; at last every tile has been measured, and the best won."""
    dice, tiles = random.Random(), 4 + kills  # more than are measured between the kills
    victim = Victim(tmp_path, tiles)
    try:
        for kill in range(kills):
            before = victim.records().keys()
            victim.start()
            victim.reach(dice.choice(MOMENTS) if kill else "working", dice)
            victim.kill()
            assert before <= victim.records().keys()
        victim.start()
        assert victim.finish() == 0
    finally:
        victim.end()
    assert [file.name for file in victim.file.parent.iterdir()] == [victim.file.name]
    found = victim.records()
    for rows in (4, 5):
        mine = sorted((r for r in found.values() if r.rows == rows), key=lambda r: r.us or 0.0)
        assert mine[0].tile == text_of(PlantedTile(sweep_planted.BEST_US))
        assert sorted(r.trial for r in mine) == list(range(1, tiles + 1))
