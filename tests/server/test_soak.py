"""bench/soak.py: a short soak of a stub, and that no result is written where something is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"

pytestmark = pytest.mark.timeout(240)


def soak(file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    short = ["--stub", "--seconds", "6", "--clients", "60", "--answer", "300", "--results", str(file)]
    command = [sys.executable, str(BENCH / "soak.py"), *short, *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_short_soak_leaves_nothing_behind_and_counts_all(tmp_path: Path) -> None:
    done = soak(tmp_path / "soak.jsonl")
    assert done.returncode == 0, done.stderr
    [line] = map(json.loads, (tmp_path / "soak.jsonl").read_text().splitlines())
    assert line["median"] <= line["most_growth_mib"] and line["used_pages"] == 0
    assert line["accepted"] == line["ended"] > sum(line["reasons"].values()) > 0
    assert line["cut_off"] and min(line["sent"].values()) > 0 and len(line["sent"]) == 11
    assert line["tasks"][1] <= line["tasks"][0] and line["descriptors"][1] <= line["descriptors"][0]
    assert {"200", "400"} <= line["statuses"].keys()


def test_what_fails_its_checks_is_not_written(tmp_path: Path) -> None:
    done = soak(tmp_path / "soak.jsonl", "--seconds", "1", "--clients", "2", "--most-growth-mib", "-1000")
    assert done.returncode == 1 and not (tmp_path / "soak.jsonl").exists()
    assert "no result is written" in done.stderr and "-1000 are allowed" in done.stderr


def test_what_is_soaked_must_be_said() -> None:
    done = subprocess.run([sys.executable, str(BENCH / "soak.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "name an artifact, or give --stub" in done.stderr


AT_REST = {
    "idle": True, "books": "", "used_pages": 0, "tasks": 2, "descriptors": 10, "failure": "", "accepted": 7, "ended": 7,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"idle": False}, "still running"),
        ({"books": "a draw was lost"}, "a draw was lost"),
        ({"used_pages": 3}, "3 pages are leaked"),
        ({"tasks": 4}, "2 tasks are leaked"),
        ({"descriptors": 11}, "1 descriptors are leaked"),
        ({"failure": "out of memory"}, "out of memory"),
        ({"ended": 6}, "7 requests were accepted, and 6 ended"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_leak_is_named(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from soak import faults
    from soak_clients import KINDS, Tally

    tally = Tally(cut_off=1)
    tally.sent.update(kind.__name__ for kind in KINDS)
    tally.reasons["length"] = 1
    assert faults(AT_REST, AT_REST, tally, 1.0, 16.0, 0) == []
    [fault] = faults(AT_REST, AT_REST | changes, tally, 1.0, 16.0, 0)
    assert words in fault
    tally.wrong.append("slow: a stream broke off")
    assert len(faults(AT_REST, AT_REST, tally, 20.0, 16.0, 1)) == 3
    assert "the load was too small" in faults(AT_REST, AT_REST, Tally(), 1.0, 16.0, 0)[0]


def test_growth_is_that_of_the_warm_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from soak import growth_mib

    assert growth_mib([10.0] * 20 + [50.0] * 79 + [90.0]) == 0
    assert growth_mib([50.0 + i for i in range(100)]) == pytest.approx(60)
