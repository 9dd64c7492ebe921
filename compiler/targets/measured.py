"""What `tilewright doctor --measure` found this machine to deliver, kept in the cache, a file for each device."""

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tilewright.compiler import env
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets.base import Target

VERSION = 1
_RANGES = {"bandwidth_gbs": (0.1, 1e6), "copy_gbs": (0.1, 1e6), "matrix_tops": (1e-3, 1e7)}


@dataclass(frozen=True)
class Ceilings:
    """bandwidth_gbs: GB/s read from memory; copy_gbs: GB/s read and written by copying. matrix_tops: 10^12 operations a
    second on bfloat16 matrices, None where nothing of ours multiplies them."""

    bandwidth_gbs: float
    copy_gbs: float | None = None
    matrix_tops: float | None = None


@dataclass(frozen=True)
class Measured:
    """Ceilings of `device`, as its driver or the system names it, and the day they were measured, as 2026-01-31."""

    device: str
    date: str
    ceilings: Ceilings

    def of(self, target: Target) -> Target:
        """The target with what was measured in place of its record's figures."""
        matrix_tops = self.ceilings.matrix_tops or target.matrix_tops
        return replace(target, bandwidth_gbs=self.ceilings.bandwidth_gbs, matrix_tops=matrix_tops)


def read(device: str) -> Measured | None:
    """What was measured on `device`; None where nothing was. Raises TargetError for a file that was damaged, or that
    another version wrote."""
    file = _file(device)
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(file, f"can't be read: {error}") from None
    try:
        fields = json.loads(text)
        version = fields.pop("version")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _refusal(file, "holds no measured figures") from None
    if version != VERSION:
        raise _refusal(file, f"has version {version!r}, and this tilewright reads {VERSION}")
    try:
        found = Measured(**{**fields, "ceilings": Ceilings(**fields["ceilings"])})
        time.strptime(found.date, "%Y-%m-%d")
        wrong = [name for name, limits in _RANGES.items() if not _within(getattr(found.ceilings, name), *limits)]
    except (KeyError, TypeError, ValueError):
        raise _refusal(file, "lacks a figure or has one too many") from None
    if wrong or found.device != device or found.ceilings.bandwidth_gbs is None:
        raise _refusal(file, f"is wrong about {wrong[0] if wrong else 'its device'}")
    return found


def write(device: str, ceilings: Ceilings) -> Measured:
    """Keeps what was measured on `device` today. Raises TargetError where the cache can't be written to."""
    found = Measured(device, time.strftime("%Y-%m-%d"), ceilings)
    file = _file(device)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"version": VERSION, **asdict(found)}, indent=1) + "\n")
        aside.replace(file)
    except OSError as error:
        raise TargetError(
            f"the cache {env.cache_dir()} can't be written to ({error.strerror}); make room, or set {env.CACHE_DIR} to "
            "another place"
        ) from None
    return found


def slug(device: str) -> str:
    """A device's name as a file's."""
    words = "".join(c if c.isalnum() and c.isascii() else " " for c in device.lower()).split()
    return "-".join(words)[:100] or "device"


def _file(device: str) -> Path:
    return env.cache_dir() / "measured" / f"{slug(device)}.json"


def _within(value: Any, low: float, high: float) -> bool:
    return value is None or (type(value) in (int, float) and low <= value <= high)


def _refusal(file: Path, what: str) -> TargetError:
    return TargetError(f"{file} {what}; run tilewright doctor --measure, or remove it")
