"""Lines of results, written as they come: what was timed, on what, of which commit."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import Case

ROOT = Path(__file__).parent.parent


class Results:
    """Appends a line a figure to `file`: case, engine, unit, median, spread (least and greatest), samples, then what
    `add` is told of it and what `about` says of all."""

    def __init__(self, file: Path, cases: Mapping[str, Case], about: Mapping[str, Any]):
        self._file = file
        self._cases = cases
        self._about = dict(about)
        self.medians: dict[tuple[str, str], float] = {}

    def add(self, case: str, engine: str, samples: Sequence[float], **more: Any) -> None:
        median = statistics.median(samples)
        self.medians[case, engine] = median
        line = {
            "case": case,
            "engine": engine,
            "unit": self._cases[case].unit,
            "median": round(median, 4),
            "spread": [round(min(samples), 4), round(max(samples), 4)],
            "samples": len(samples),
            **more,
            **self._about,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        spread = f"{min(samples):.2f} to {max(samples):.2f}"
        print(f"{case:16} {engine:12} {median:10.2f} {line['unit']:9} ({spread})", flush=True)

    def ratio(self, case: str, ours: str = "tilewright", theirs: str = "llama_cpp") -> float:
        """How many times better ours is."""
        a, b = self.medians[case, ours], self.medians[case, theirs]
        ratio = a / b if self._cases[case].higher else b / a
        print(f"{case:16} {'ratio':12} {ratio:10.2f} ×", flush=True)
        return ratio


def about(commit: str | None, device: str, packages: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """What stands in every line of a run. commit: what is timed, where the checkout's own word is not to be taken.
    packages: whose versions matter, beside apache-tvm's."""
    versions = {name: importlib.metadata.version(name) for name in ("apache-tvm", *packages)}
    return {
        "commit": commit or _head(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device,
        **more,
        "versions": {"python": platform.python_version(), **versions},
    }


def _head() -> str:
    """The commit that is checked out, with a + where tracked files differ from it."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()
