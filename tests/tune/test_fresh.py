"""A fresh sweep's folder beside the committed records, as bench/tune.py compares them, with made-up records."""

import json
from pathlib import Path

import pytest

from tests.tune.examples import DEVICE, record
from tilewright.schedules.records import Record
from tilewright.tuner.log import Log

BENCH = Path(__file__).parent.parent.parent / "bench"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def folder(place: Path, *records: Record) -> Path:
    Log(place, records[0].device).add(records)
    return place


def lines(tmp_path: Path, fresh: list[Record], committed: list[Record]) -> list[dict]:
    from cases import TUNE_CASES
    from results_file import Results
    from tune_fresh import read_folder, report

    file = tmp_path / "lines.jsonl"
    fresh_logs, logs = folder(tmp_path / "fresh", *fresh), folder(tmp_path / "committed", *committed)
    report(read_folder(fresh_logs), read_folder(logs), Results(file, TUNE_CASES, {}))
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_task_with_a_committed_record_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = [
        record(1, 10.0, rows=8, date="2026-01-31T12:00:00Z"),
        record(2, 8.0, rows=8, date="2026-01-31T12:00:20Z"),
        record(4, None, rows=8, date="2026-01-31T12:00:30Z"),
        record(1, 6.0, rows=16, date="2026-01-31T12:01:00Z"),
        record(1, 5.0, rows=32, date="2026-01-31T12:01:05Z"),
        record(1, None, rows=64, date="2026-01-31T12:01:30Z"),
    ]
    committed = [record(1, 12.0, rows=8), record(2, 13.0, rows=8), record(1, 7.0, rows=16, space="0" * 16)]
    task, sweep = lines(tmp_path, fresh, committed)
    assert (task["case"], task["median"], task["trials"]) == ("fresh", 1.5, 3)
    assert (task["fresh_us"], task["committed_us"], task["tile_ratio"]) == (8.0, 12.0, 1.25)
    assert task["tile"]["width"] == 2 and task["committed_tile"]["width"] == 1
    assert (sweep["case"], sweep["median"], sweep["samples"]) == ("fresh-sweep", 1.5, 1)
    assert (sweep["tasks"], sweep["without_committed"], sweep["committed_stale"]) == (3, 1, 1)
    assert (sweep["trials"], sweep["seconds"]) == (6, 90.0)
    out = capsys.readouterr().out
    assert "made_up n 7 m=16: best 6 us of 1 trials; records of another space of tiles alone" in out
    assert "made_up n 7 m=32: best 5 us of 1 trials; no committed record" in out


def test_records_of_another_device_are_not_compared(tmp_path: Path) -> None:
    other = record(1, 12.0, device="Another 1, 2 cores")
    with pytest.raises(SystemExit, match="no task of the sweep has a committed record of its space on the same device"):
        lines(tmp_path, [record(1, 10.0)], [other])


def test_a_folder_without_one_devices_records_is_refused(tmp_path: Path) -> None:
    from tune_fresh import one_device, read_folder

    with pytest.raises(SystemExit, match="has no tuning records; give the folder that tilewright tune --logs wrote"):
        read_folder(tmp_path)
    logs = folder(tmp_path, record(1, 10.0))
    assert one_device(read_folder(logs), logs) == DEVICE
    folder(tmp_path, record(1, 10.0, device="Another 1, 2 cores"))
    with pytest.raises(SystemExit, match="has records of Another 1, 2 cores, Made Up 9000, 4 cores; give a folder of"):
        one_device(read_folder(logs), logs)
    file = logs / "made-up-9000-4-cores" / "made_up.jsonl"
    file.write_text(file.read_text() + "{\n")
    with pytest.raises(SystemExit, match="is no JSON"):
        read_folder(logs)
