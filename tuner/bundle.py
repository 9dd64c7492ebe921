"""Compile here, measure there: candidates as a file, for a machine that has the GPU and no compiler.

A bundle is a tar of bundle.json, which says for each task what is computed, by which candidates, and what their records
will say; and of the candidates' libraries and device code. What measuring makes of it is a file of records.

Free of TVM, of which measuring needs the runtime alone.
"""

import dataclasses
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilewright.compiler.composites import dump_spec, load_spec
from tilewright.compiler.errors import UserError
from tilewright.compiler.targets import find_target, run_obstacle
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Output
from tilewright.schedules.records import Record, UnreadableRecord, parse, target_text
from tilewright.tuner.candidates import Candidate, Failure, Launch
from tilewright.tuner.measuring import Measurer
from tilewright.tuner.outcomes import Provenance, finished, now
from tilewright.tuner.problems import Problem

VERSION = 1
_CONTENTS = "bundle.json"


@dataclass(frozen=True)
class Bundled:
    """A task of a bundle. blank: its records without device, tile and outcome. tiles: candidates by their tile's text,
    the default first."""

    problem: Problem
    blank: Record
    floor_us: float | None
    tiles: Mapping[str, Candidate]


def write(file: Path, target: Target, entries: Sequence[Bundled]) -> None:
    """Writes the bundle of compiled tasks. Raises UserError where it can't be written."""
    files: dict[str, Path] = {}

    def member(path: str) -> str:
        files[Path(path).name] = Path(path)
        return Path(path).name

    tasks = []
    for entry in entries:
        problem = dataclasses.asdict(entry.problem) | {"spec": dump_spec(entry.problem.spec)}
        candidates = [
            {
                "tile": text,
                "library": member(c.library),
                "parts": [member(part) for part in c.parts],
                "launches": [dataclasses.asdict(launch) for launch in c.launches],
                "results": c.results,
            }
            for text, c in entry.tiles.items()
        ]
        blank = dataclasses.asdict(entry.blank)
        tasks.append({"problem": problem, "blank": blank, "floor_us": entry.floor_us, "candidates": candidates})
    made_for = {"target": target.name, "kind": target.kind, "machine": target_text(target)}
    contents = json.dumps({"version": VERSION, **made_for, "tasks": tasks}).encode()
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with writing(file), tarfile.open(aside, "w") as tar:
            about = tarfile.TarInfo(_CONTENTS)
            about.size = len(contents)
            tar.addfile(about, io.BytesIO(contents))
            for name, path in sorted(files.items()):
                tar.add(path, name)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{file} can't be written ({error.strerror}); make room, or name another place") from None


@contextmanager
def opened(file: Path) -> Iterator[tuple[str, list[Bundled]]]:
    """The kind of device and the tasks of a bundle, whose code lies unpacked until the block ends. Raises UserError for
    a file that is none, or whose target this machine is not."""
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        try:
            with tarfile.open(file) as tar:
                for member in tar:
                    if member.isfile() and "/" not in member.name:
                        tar.extract(member, folder)
            contents = json.loads((Path(folder) / _CONTENTS).read_text())
            version = contents["version"]
        except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{file} is no bundle of tuning tasks; make one with tilewright tune --export") from None
        if version != VERSION:
            raise UserError(f"{file} has version {version!r}, and this tilewright reads {VERSION}; export it anew")
        here = find_target(contents["target"])
        obstacle = run_obstacle(here)
        if obstacle is None and target_text(here) != contents["machine"]:
            obstacle = f"it was made for {contents['machine']}, and this machine is {target_text(here)}"
        if obstacle:
            raise UserError(f"{file} is for {contents['target']} and can't be measured here: {obstacle}")
        yield contents["kind"], [_bundled(entry, Path(folder)) for entry in contents["tasks"]]


def _bundled(entry: Mapping[str, Any], folder: Path) -> Bundled:
    about = dict(entry["problem"])
    about |= {"spec": load_spec(about["composite"], about["spec"]), "inner": tuple(about["inner"])}
    tiles = {candidate["tile"]: _candidate(candidate, folder) for candidate in entry["candidates"]}
    return Bundled(Problem(**about), Record(**entry["blank"]), entry["floor_us"], tiles)


def _candidate(about: Mapping[str, Any], folder: Path) -> Candidate:
    launches = tuple(
        Launch(
            launch["symbol"],
            tuple(launch["inputs"]),
            tuple(Output(o["name"], tuple(o["shape"]), o["dtype"]) for o in launch["outputs"]),
            launch["shared"],
        )
        for launch in about["launches"]
    )
    parts = tuple(str(folder / part) for part in about["parts"])
    return Candidate(str(folder / about["library"]), parts, launches, tuple(about["results"]))


def measure(
    tasks: Iterable[Bundled], measurer: Measurer, by: Provenance, output: Path, done: Callable[[Record], None]
) -> int:
    """Measures what `output` has no record of yet, and adds a record a line to it. Returns how many there are then."""
    found = _read(output)
    known = {(*r.task, r.tile) for r in found if r.device == by.device}
    with writing(output), output.open("a") as lines:
        for task in tasks:
            blank = replace(task.blank, device=by.device, driver=by.driver)
            default = next(iter(task.tiles.values()))
            for trial, (tile, candidate) in enumerate(task.tiles.items(), 1):
                if (*blank.task, tile) in known:
                    continue
                outcome = measurer.measure(task.problem, default, candidate)
                record = finished(replace(blank, trial=trial), tile, outcome, task.floor_us, now())
                lines.write(record.line() + "\n")
                lines.flush()
                found.append(record)
                done(record)
                if candidate is default and isinstance(outcome, Failure):
                    break  # nothing to hold the others to
    return len(found)


def _read(output: Path) -> list[Record]:
    """What an earlier run left; a line that was cut off is measured again."""
    if not output.exists():
        return []
    records = []
    for line in output.read_text(errors="replace").splitlines():
        try:
            records.append(parse(line))
        except UnreadableRecord:
            continue
    output.write_text("".join(f"{record.line()}\n" for record in records))
    return records
