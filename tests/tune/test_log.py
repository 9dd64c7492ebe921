"""The log folder: whole and sorted at any moment, for one process at a time, and merged with others."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tune.examples import DEVICE, FOLDER, record
from tilewright.compiler.errors import UserError
from tilewright.schedules.records import parse
from tilewright.tuner.log import Log, LogError, locked, merge


def lines(logs: Path, device: str = FOLDER) -> list[str]:
    return (logs / device / "made_up.jsonl").read_text().splitlines()


def test_files_are_sorted_and_hold_the_last_of_each_candidate(tmp_path: Path) -> None:
    log = Log(tmp_path, DEVICE)
    for each in (record(4, 3.0), record(2, None), record(1, 9.0), record(4, 5.0), record(1, 8.0, rows=2)):
        log.add([each])
        found = [parse(line) for line in lines(tmp_path)]
        assert found == sorted(found, key=lambda r: r.order)
    assert [(r.rows, r.us) for r in found] == [(2, 8.0), (8, 5.0), (8, 9.0), (8, None)]
    assert Log(tmp_path, DEVICE).records == found
    assert [f.name for f in (tmp_path / FOLDER).iterdir()] == ["made_up.jsonl"]


def test_lines_that_are_no_records_stay(tmp_path: Path) -> None:
    file = tmp_path / FOLDER / "made_up.jsonl"
    file.parent.mkdir()
    file.write_text("# by hand\n" + record(4).line() + "\n" + record(2).line()[:50])
    log = Log(tmp_path, DEVICE)
    assert [p.split(" ")[0] for p in log.problems] == [f"{file}:1", f"{file}:3"]
    log.add([record(1)])
    assert [line for line in lines(tmp_path) if not line.endswith("}")] == ["# by hand", record(2).line()[:50]]
    assert len(lines(tmp_path)) == 4


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path, DEVICE)
    log.add([record(1)])
    before = lines(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        LogError, match=r"can't be written to \(No space left on device\); make room, or use another --logs"
    ):
        log.add([record(2)])
    assert lines(tmp_path) == before
    assert [f.name for f in (tmp_path / FOLDER).iterdir()] == ["made_up.jsonl"]


def test_a_second_sweep_is_told_of_the_first(tmp_path: Path) -> None:
    hold = f"""
from pathlib import Path
from tilewright.tuner.log import locked
with locked(Path({str(tmp_path)!r})):
    print(1, flush=True)
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"1\n"
    try:
        with (
            pytest.raises(LogError, match=f"is in use by process {other.pid} on .*; wait for it, end it"),
            locked(tmp_path),
        ):
            pass
    finally:
        other.kill()
        other.communicate()
    with locked(tmp_path):  # a killed process holds nothing
        pass


def test_folders_and_files_are_merged(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    Log(here, DEVICE).add([record(1, 5.0), record(2, 6.0)])
    late = "2026-03-01T00:00:00Z"
    Log(there, DEVICE).add([record(1, 4.0, date=late), record(4, 7.0)])
    Log(there, "GPU").add([record(1, device="GPU")])
    loose = tmp_path / "loose.jsonl"
    loose.write_text(record(2, 9.0, date="2025-01-01T00:00:00Z").line() + "\n{torn")
    found, kept, problems = merge([there, loose], here)
    assert (found, kept) == (4, 3)  # the loose one is older
    assert problems == [f"{loose}:2 is no JSON: skipped"]
    assert [(parse(line).us) for line in lines(here)] == [4.0, 6.0, 7.0]
    assert len(lines(here, "gpu")) == 1
    assert merge([there], here)[:2] == (3, 3)  # once more changes nothing
    with pytest.raises(UserError, match="is no file or folder of tuning records"):
        merge([tmp_path / "nothing"], here)
