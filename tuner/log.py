"""The records of one device, as a sweep adds to them.

Each record rewrites its file aside and renames it, so that the file is whole and sorted at any moment: a kill loses at
most the candidate that is running, and what it leaves aside goes with the next record. Lines that are no records are
kept as they are, at the end.
"""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

from tilewright.compiler.errors import UserError
from tilewright.compiler.targets.measured import slug
from tilewright.schedules.records import Record, UnreadableRecord, merged, parse, read_file

_LOCK = ".lock"


class LogError(UserError):
    """A log folder that can't be written, or that another process writes."""


@contextlib.contextmanager
def locked(logs: Path) -> Iterator[None]:
    """The log folder for this process alone, until the block or the process ends. Raises LogError."""
    with _writable(logs):
        logs.mkdir(parents=True, exist_ok=True)
        handle = os.open(logs / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise LogError(f"{logs} is in use by {other}; wait for it, end it, or use another --logs") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


class Log:
    """`<logs>/<device>/*.jsonl`. problems: of lines that can't be read, a sentence each."""

    def __init__(self, logs: Path, device: str) -> None:
        self._folder = logs / slug(device)
        self._records: dict[str, list[Record]] = {}
        self._others: dict[str, list[str]] = {}
        self.problems: list[str] = []
        for file in sorted(self._folder.glob("*.jsonl")):
            records, self._others[file.stem], problems = read_file(file)
            self._records[file.stem] = merged(records)
            self.problems += problems

    @property
    def records(self) -> list[Record]:
        return [record for records in self._records.values() for record in records]

    def add(self, records: Iterable[Record]) -> None:
        """Raises LogError where a file can't be written."""
        by_schedule: dict[str, list[Record]] = {}
        for record in records:
            by_schedule.setdefault(record.schedule, []).append(record)
        for schedule, new in by_schedule.items():
            self._records[schedule] = merged([*self._records.get(schedule, ()), *new])
            self._write(schedule)

    def _write(self, schedule: str) -> None:
        lines = [*(record.line() for record in self._records[schedule]), *self._others.get(schedule, ())]
        with _writable(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            aside = self._folder / f".{schedule}.new"
            try:
                aside.unlink(missing_ok=True)
                with open(aside, "x") as stream:
                    stream.write("".join(f"{line}\n" for line in lines))
                    stream.flush()
                    os.fsync(stream.fileno())
                os.chmod(aside, 0o644)
                os.replace(aside, self._folder / f"{schedule}.jsonl")
            finally:
                aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogError(
            f"the log folder {folder} can't be written to ({error.strerror}); make room, or use another --logs"
        ) from None


def merge(sources: Iterable[Path], logs: Path) -> tuple[int, int, list[str]]:
    """Takes the records of files, and of other log folders, into a log folder. Of two of one candidate the later one
    counts. Returns how many were read, how many of them count now, and what is wrong with the lines that are none.
    Raises LogError, and UserError for a source that is not there.
    """
    files = [file for source in sources for file in _files(source)]
    found: list[Record] = []
    problems: list[str] = []
    for file in files:
        for number, line in enumerate(file.read_bytes().decode(errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                found.append(parse(line, f"{file}:{number}"))
            except UnreadableRecord as problem:
                problems.append(f"{file}:{number} {problem}: skipped")
    with locked(logs):
        kept = 0
        for device in sorted({record.device for record in found}):
            log, mine = Log(logs, device), [record for record in found if record.device == device]
            log.add(mine)
            problems += log.problems
            places = {record.place for record in log.records}
            kept += sum(record.place in places for record in mine)
    return len(found), kept, problems


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(source.glob("*/*.jsonl")) or sorted(source.glob("*.jsonl"))
    if not source.is_file():
        raise UserError(f"{source} is no file or folder of tuning records")
    return [source]
