"""When requests arrive and what they ask for: drawn at a rate, or read from a trace.

Traces are files in the form of BurstGPT (Wang et al. 2024, "BurstGPT: A Real-world Workload Dataset to Optimize LLM
Serving Systems"), whose arrivals its authors describe by Gamma-distributed times between requests.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tilewright.compiler.errors import UserError

TIMESTAMP, PROMPT, OUTPUT = "Timestamp", "Request tokens", "Response tokens"


@dataclass(frozen=True)
class Arrival:
    """One request. due_s: seconds after the start, whatever became of the others."""

    due_s: float
    prompt_tokens: int
    output_tokens: int


def drawn(
    rate: float, requests: int, gamma_shape: float, prompt_tokens: int, output_tokens: int, seed: int
) -> list[Arrival]:
    """Arrivals at `rate` a second on average. gamma_shape: of the times between them; 1 makes a Poisson process, less
    makes bursts (the variance of a time is 1 / shape of the squared mean)."""
    gaps = np.random.default_rng(seed).gamma(gamma_shape, 1 / (rate * gamma_shape), requests)
    return [Arrival(float(due), prompt_tokens, output_tokens) for due in np.cumsum(gaps)]


def read_trace(path: Path, most: int | None = None) -> tuple[list[Arrival], int]:
    """(the arrivals of a BurstGPT file by time, the first at 0; how many rows had no answer and are left out).

    most: take so many at most. Raises UserError.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in (TIMESTAMP, PROMPT, OUTPUT) if name not in (rows.fieldnames or ())]
            if missing:
                raise UserError(
                    f"the trace {path} has no column {missing[0]!r}; give a file with {TIMESTAMP}, {PROMPT}, {OUTPUT}"
                )
            found = [_arrival(path, rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the trace {path} can't be read ({reason}); give a CSV file in UTF-8") from None
    asked = sorted((each for each in found if each.output_tokens), key=lambda each: each.due_s)
    if not asked:
        raise UserError(f"the trace {path} has no request with response tokens; give another one")
    first_s = asked[0].due_s
    return [replace(each, due_s=each.due_s - first_s) for each in asked[:most]], len(found) - len(asked)


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same pattern, faster or slower: `rate` a second on average."""
    factor = mean_rate(arrivals) / rate
    return [replace(each, due_s=each.due_s * factor) for each in arrivals]


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests a second. Raises UserError where all come at one moment."""
    span_s = arrivals[-1].due_s - arrivals[0].due_s
    if not span_s:
        raise UserError("all requests of the trace come at one moment, which is no rate; take more of it")
    return (len(arrivals) - 1) / span_s


def _arrival(path: Path, line: int, row: dict[str, str | None]) -> Arrival:
    def number(name: str) -> float:
        text = row[name] or ""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise UserError(f"line {line} of the trace {path} has {name} {text!r}; give a number from 0 up")
        return value

    return Arrival(number(TIMESTAMP), max(1, int(number(PROMPT))), int(number(OUTPUT)))
