"""Tuning records: what a tile of a schedule was measured to take, one a line of <logs>/<device>/<schedule>.jsonl.

A record says where it was made (device, driver, versions), for what (target, schedule, facts, rows), of which search
space, and what came out: a time with its spread and fraction of the floor, or how the candidate failed. It counts only
where the hash of the schedule's space is the same today. tuner/ writes them; a compile reads the best of each task.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tilewright.compiler import targets
from tilewright.compiler.targets.base import Target
from tilewright.compiler.targets.measured import slug

logger = logging.getLogger(__name__)

VERSION = 1

# How a candidate can fail. "wrong" is one that gives other numbers than the reference or other bits than the default.
FAILURES = ("compile", "wrong", "crash", "hang", "memory")


class UnreadableRecord(Exception):
    """Why a line is no record of this version."""


@dataclass(frozen=True)
class Record:
    """One candidate measured once, or more than once and the last time counts.

    target, facts, tile: canonical text (`target_text`, `text_of`). rows: that the call had. space: `space_hash`. trial:
    which of its task's candidates it was; the first is the default tile.
    bytes, operations: that a call can't do without. us: median microseconds of a call, None where it failed; spread_us:
    the middle half of the samples. of_floor: the floor over `us`, None where the device's ceilings are not known.
    failure: one of FAILURES, or "". date: UTC, to the second. place: file and line it was read from.
    """

    device: str
    target: str
    schedule: str
    facts: str
    rows: int
    space: str
    tile: str
    trial: int = 1
    bytes: int = 0
    operations: int = 0
    us: float | None = None
    spread_us: tuple[float, float] | None = None
    of_floor: float | None = None
    failure: str = ""
    detail: str = ""
    driver: str = ""
    versions: str = "{}"
    date: str = ""
    clock_mhz: float | None = None
    temperature_c: float | None = None
    place: str = field(default="", compare=False)

    @property
    def task(self) -> tuple[str, str, str, int]:
        """What records must share for their times to be compared."""
        return self.target, self.schedule, self.facts, self.rows

    @property
    def key(self) -> tuple[Any, ...]:
        """Of two records with one key the later counts."""
        return *self.task, self.space, self.tile

    @property
    def order(self) -> tuple[Any, ...]:
        """The order in a file: by task, the fastest first, failures last."""
        return *self.task, self.space, self.us is None, self.us or 0.0, self.tile

    def line(self) -> str:
        fields = dataclasses.asdict(self)
        del fields["place"]
        for name in _NESTED:
            fields[name] = json.loads(fields[name])
        said = {name: value for name, value in fields.items() if value not in (None, "")}
        return json.dumps({"version": VERSION, **said})


_NESTED = ("facts", "tile", "versions")  # JSON in JSON: objects in the file, canonical text in a Record
_REQUIRED = {"device", "target", "schedule", "facts", "rows", "space", "tile"}
_NUMBERS = ("us", "of_floor", "clock_mhz", "temperature_c")
_COUNTS = ("rows", "trial", "bytes", "operations")
_TEXTS = ("device", "target", "schedule", "space", "failure", "detail", "driver", "date")


def parse(line: str, place: str = "") -> Record:
    """The record of a line. Raises UnreadableRecord with the reason where there is none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise UnreadableRecord("is no JSON") from None
    if not isinstance(fields, dict) or "version" not in fields:
        raise UnreadableRecord("is no tuning record")
    if fields.pop("version") != VERSION:
        raise UnreadableRecord(f"is of another version than {VERSION}, which this tilewright reads")
    known = {f.name for f in dataclasses.fields(Record)} - {"place"}
    odd = sorted(set(fields) - known) or sorted(_REQUIRED - set(fields))
    if odd:
        raise UnreadableRecord(f"has one field too many or too few: {odd[0]}")
    wrong = next((name for name in fields if not _fits(name, fields[name])), None)
    if wrong is not None:
        raise UnreadableRecord(f"has a {wrong} that can't be")
    if (fields.get("us") is None) == (not fields.get("failure")):
        raise UnreadableRecord("has neither a time nor a failure, or both")
    fields |= {name: canonical(fields[name]) for name in _NESTED if name in fields}
    if fields.get("spread_us") is not None:
        fields["spread_us"] = tuple(fields["spread_us"])
    return Record(**fields, place=place)


def _fits(name: str, value: Any) -> bool:
    if name in _NESTED:
        return isinstance(value, dict)
    if name in _NUMBERS:
        return type(value) in (int, float) and value >= 0 and (name != "us" or 0 < value < 1e12)
    if name in _COUNTS:
        return type(value) is int and value >= (name in ("rows", "trial"))
    if name == "spread_us":
        return isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    if name == "failure" and value not in ("", *FAILURES):
        return False
    return name in _TEXTS and isinstance(value, str) and (value != "" or name not in _REQUIRED)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@cache  # a compile asks for the same facts and tiles again and again
def text_of(value: Any) -> str:
    """Facts, or a tile, as canonical text: equal values of one class give equal text."""
    return canonical({"is": type(value).__name__, **dataclasses.asdict(value)})


def target_text(target: Target) -> str:
    """What kernels may know of a target, without its ceilings: records of one text are for the same kernels."""
    return " ".join([target.name, target.arch, *target.features])


def space_hash(space: Sequence[Any]) -> str:
    """Of a space's tiles, in whatever order: 64 bits in hexadecimal."""
    return hashlib.sha256("\n".join(sorted(map(text_of, space))).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Known:
    """The records that count for one target."""

    records: tuple[Record, ...] = ()

    @cached_property
    def _by_facts(self) -> Mapping[tuple[str, str], list[Record]]:
        found: dict[tuple[str, str], list[Record]] = {}
        for record in self.records:
            found.setdefault((record.schedule, record.facts), []).append(record)
        return found

    def _of(self, schedule: str, facts: Any) -> Sequence[Record]:
        return self._by_facts.get((schedule, text_of(facts)), ()) if self.records else ()

    def best(self, schedule: str, facts: Any, rows: int, space: Sequence[Any]) -> tuple[Any, Record] | None:
        """The fastest tile of a space that was measured, and its record; None where none was. Records for other
        numbers of rows than `rows` count where facts don't tell these apart: those for the nearest number."""
        records = self._of(schedule, facts)
        if not records:
            return None
        current, tiles = space_hash(space), {text_of(tile): tile for tile in space}
        valid = [r for r in records if r.space == current and r.us is not None and r.tile in tiles]
        if not valid:
            return None
        record = fastest(valid, rows)
        return tiles[record.tile], record

    def stale(self, schedule: str, facts: Any, space: Sequence[Any]) -> list[Record]:
        """The records of facts that are of another space than today's."""
        records = self._of(schedule, facts)
        current = space_hash(space) if records else ""
        return [r for r in records if r.space != current]

    @property
    def digest(self) -> str:
        """Of all that a compile takes from them."""
        return hashlib.sha256("\n".join(record.line() for record in self.records).encode()).hexdigest()[:16]


NOTHING_KNOWN = Known()


def fastest(records: Sequence[Record], rows: int) -> Record:
    """Of records with times, the fastest for the number of rows that is nearest to `rows`."""
    nearest = min((r.rows for r in records), key=lambda n: (max(n, rows) / min(n, rows), -n))
    return min((r for r in records if r.rows == nearest), key=lambda r: (r.us or 0.0, r.tile))


def read_file(file: Path) -> tuple[list[Record], list[str], list[str]]:
    """The records of a file; the lines that are none; and what is wrong with each of those, in a sentence.

    Of several records with one key, such as a merge by hand leaves, the latest counts.
    """
    records: dict[tuple[Any, ...], Record] = {}
    lines, problems = [], []
    try:
        text = file.read_bytes().decode(errors="replace")
    except OSError as error:
        return [], [], [f"{file} can't be read ({error.strerror}): skipped"]
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse(line, f"{file.parent.name}/{file.name}:{number}")
            if (record.schedule, slug(record.device)) != (file.stem, file.parent.name):
                raise UnreadableRecord(f"is of {record.schedule} on {record.device}, and belongs into another file")
        except UnreadableRecord as problem:
            lines.append(line)
            problems.append(f"{file}:{number} {problem}: skipped")
            continue
        last = records.get(record.key)
        if last is None or record.date >= last.date:
            records[record.key] = record
    return list(records.values()), lines, problems


def known_here(logs: Path, target: Target) -> Known:
    """The records in a log folder that a compile for `target` goes by on this machine. Lines that can't be read are
    warned of, by file and line."""
    device = None if targets.run_obstacle(target) else targets.device_name(target.kind)
    known, problems = read_known(logs, target, device)
    for problem in problems:
        logger.warning("%s", problem)
    return known


def read_known(logs: Path, target: Target, device: str | None) -> tuple[Known, list[str]]:
    """The records for `target`: those of `device`, where that is here and code for the target runs on it, else those of
    every GPU of that record; and what is wrong with lines that can't be read, each in a sentence."""
    if device is not None:
        folders = [logs / slug(device)]
    else:
        folders = sorted(f for f in logs.glob("*") if f.is_dir()) if target.kind == "cuda" else []
    records: list[Record] = []
    problems: list[str] = []
    for file in (file for folder in folders for file in sorted(folder.glob("*.jsonl"))):
        found, _, wrong = read_file(file)
        records += found
        problems += wrong
    text = target_text(target)
    return Known(tuple(sorted((r for r in records if r.target == text), key=_stable))), problems


def _stable(record: Record) -> tuple[Any, ...]:
    return *record.order, record.device


def merged(records: Iterable[Record]) -> list[Record]:
    """Of each key the latest, in a file's order."""
    latest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        last = latest.get(record.key)
        if last is None or record.date >= last.date:
            latest[record.key] = record
    return sorted(latest.values(), key=lambda record: record.order)
