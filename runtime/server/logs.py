"""Structured logs: a line of JSON for each request, written by a thread, so that a full disk or pipe delays nobody.

A line holds no text of a prompt or an answer, unless that was asked for.
"""

import datetime
import json
import logging
import logging.handlers
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tilewright.compiler.errors import UserError

NAME = "tilewright.server"
_MOST_WAITING = 10_000  # lines that wait for a slow disk; what comes on top is dropped, and counted


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs an event. fields: what JSON can hold."""
    logging.getLogger(NAME).log(level, event, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """{"time", "level", "event", ...the event's fields}. Other libraries' records have their message as event."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _Lossy(logging.handlers.QueueHandler):
    """Drops lines where the queue is full, and says how many with the next that fits."""

    def __init__(self, waiting: "queue.Queue[logging.LogRecord]") -> None:
        super().__init__(waiting)
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # formatted by the thread; nothing in it changes after

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.dropped:
            record.fields = {**getattr(record, "fields", {}), "dropped_lines": self.dropped}
        try:
            self.queue.put_nowait(record)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1


class _Forgiving(logging.StreamHandler):
    """A line that can't be written (disk full, pipe closed) is lost, and nothing else happens."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """Sends the server's and uvicorn's logs to a file, or to stderr, until the end. Raises UserError."""
    try:
        stream = sys.stderr if path is None else path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"the log file {path} can't be written ({error.strerror}); name another one") from None
    writer = _Forgiving(stream)
    writer.setFormatter(JsonLines())
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(_MOST_WAITING)
    door = _Lossy(waiting)
    listener = logging.handlers.QueueListener(waiting, writer)
    # asyncio logs what went wrong in a task that nobody waits for.
    loggers = [logging.getLogger(NAME), logging.getLogger("uvicorn.error"), logging.getLogger("asyncio")]
    for each, level in zip(loggers, (logging.INFO, logging.ERROR, logging.ERROR), strict=True):
        each.addHandler(door)
        each.setLevel(level)
        each.propagate = False
    listener.start()
    try:
        yield
    finally:
        for each in loggers:
            each.removeHandler(door)
            each.propagate = True
        listener.stop()
        if path is not None:
            with suppress(OSError):
                stream.close()
