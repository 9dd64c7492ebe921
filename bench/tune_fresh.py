"""What folders of records say by themselves: what tuning gained, and whether a fresh sweep finds faster tiles."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from results_file import Results

from tilewright.schedules.records import Record, read_file
from tilewright.tuner.report import words

TaskKey = tuple[str, str, str, int]


@dataclass(frozen=True)
class Comparison:
    """One task of a fresh sweep. committed: its best committed record, None where there is none of the same space.
    stale: whether there are committed records of another space of tiles."""

    trials: int
    fresh: Record
    committed: Record | None
    stale: bool
    as_measured_now_us: float | None  # of the committed tile, where the fresh sweep tried it too

    @property
    def name(self) -> str:
        return f"{self.fresh.schedule} {words(self.fresh.facts)} m={self.fresh.rows}"

    @property
    def ratio(self) -> float | None:
        """The committed best time over the fresh best time: above 1 where the fresh sweep was better."""
        return self.committed.us / self.fresh.us if self.committed and self.committed.us and self.fresh.us else None

    @property
    def tile_ratio(self) -> float | None:
        """What the committed tile takes in the fresh sweep over the best there: nothing of another day is in it."""
        return self.as_measured_now_us / self.fresh.us if self.as_measured_now_us and self.fresh.us else None


def read_folder(logs: Path) -> list[Record]:
    """The records of a log folder. Ends the program where there is none, or a line that is none."""
    found: list[Record] = []
    for file in sorted(logs.glob("*/*.jsonl")):
        records, _, problems = read_file(file)
        if problems:
            raise SystemExit(problems[0])
        found += records
    if not found:
        raise SystemExit(f"{logs} has no tuning records; give the folder that tilewright tune --logs wrote")
    return found


def one_device(records: Sequence[Record], logs: Path) -> str:
    devices = sorted({record.device for record in records})
    if len(devices) > 1:
        raise SystemExit(f"{logs} has records of {', '.join(devices)}; give a folder of one device's sweep")
    return devices[0]


def compare(fresh: Iterable[Record], committed: Iterable[Record]) -> list[Comparison]:
    """The tasks of a sweep that have a time, by name. Records of other devices count for nothing."""
    fresh = list(fresh)
    devices = {record.device for record in fresh}
    known = by_task(record for record in committed if record.device in devices)
    compared = []
    for task, mine in by_task(fresh).items():
        best = fastest(mine)
        if best is None:
            continue
        theirs = known.get(task, [])
        valid = [record for record in theirs if record.space == best.space]
        match = fastest(valid)
        now = next((r.us for r in mine if match and r.tile == match.tile), None)
        compared.append(Comparison(len(mine), best, match, len(valid) < len(theirs), now))
    return sorted(compared, key=lambda comparison: comparison.name)


def by_task(records: Iterable[Record]) -> Mapping[TaskKey, list[Record]]:
    found: dict[TaskKey, list[Record]] = {}
    for record in records:
        found.setdefault(record.task, []).append(record)
    return found


def fastest(records: Sequence[Record]) -> Record | None:
    return min((r for r in records if r.us is not None), key=lambda r: r.us or 0.0, default=None)


def sweep_seconds(records: Sequence[Record]) -> float:
    """From the first record to the last: a sweep's lowering and its first candidate's compilation come before."""
    dates = [datetime.fromisoformat(record.date.replace("Z", "+00:00")) for record in records if record.date]
    return (max(dates) - min(dates)).total_seconds() if dates else 0.0


def report(fresh: Sequence[Record], committed: Sequence[Record], out: Results) -> None:
    """A line for each task that has both, and one for the sweep."""
    compared = compare(fresh, committed)
    with_both = [task for task in compared if task.ratio is not None and task.committed is not None]
    for task in with_both:
        assert task.ratio is not None
        assert task.committed is not None
        more = {"tile_ratio": round(task.tile_ratio, 4)} if task.tile_ratio else {}
        facts = {"task": task.name, "trials": task.trials, "fresh_us": task.fresh.us, "committed_us": task.committed.us}
        tiles = {"tile": json.loads(task.fresh.tile), "committed_tile": json.loads(task.committed.tile)}
        out.add("fresh", "tilewright", [task.ratio], **facts, **more, **tiles)
    without = [task for task in compared if task.ratio is None]
    counts = {
        "tasks": len(compared),
        "without_committed": sum(not task.stale for task in without),
        "committed_stale": sum(task.stale for task in without),
        "trials": len(fresh),
        "seconds": sweep_seconds(fresh),
    }
    for task in without:
        why = "records of another space of tiles alone" if task.stale else "no committed record"
        print(f"{task.name}: best {task.fresh.us:.4g} us of {task.trials} trials; {why}")
    if not with_both:
        raise SystemExit("no task of the sweep has a committed record of its space on the same device")
    out.add("fresh-sweep", "tilewright", [task.ratio for task in with_both if task.ratio], **counts)


def report_gains(records: Sequence[Record], out: Results) -> None:
    """A line for each task whose default tile was measured: its best beside it."""
    for mine in by_task(records).values():
        newest = max(mine, key=lambda record: record.date or "").space
        valid = [record for record in mine if record.space == newest and record.us]
        default = next((record for record in valid if record.trial == 1), None)
        best = fastest(valid)
        if default is None or best is None or not default.us or not best.us:
            continue
        facts = {
            "task": f"{best.schedule} {words(best.facts)} m={best.rows}",
            "tile": best.tile,
            "default_us": default.us,
            "of_floor": best.of_floor,
            "tried": len(valid),
        }
        gain = round(1 - best.us / default.us, 4)
        out.add("gain", "tilewright", [*(best.spread_us or ()), best.us], **facts, gain=gain)
