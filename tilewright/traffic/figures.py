"""What a run's outcomes amount to: percentiles, throughput, and goodput under an objective.

Goodput is the rate of requests that meet every objective (Zhong et al. 2024, "DistServe").
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tilewright.traffic.client import Outcome

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True)
class Objective:
    """What an answer must keep to count. Milliseconds: to the first token, a token after it on average, to the end."""

    ttft_ms: float
    tpot_ms: float
    e2e_ms: float | None = None

    def met(self, outcome: Outcome) -> bool:
        one = of_request(outcome)
        return outcome.error is None and all(
            limit is None or one[name] is None or one[name] <= limit for name, limit in asdict(self).items()
        )


def of_request(outcome: Outcome) -> dict[str, Any]:
    """One request's own figures; times count from when it was due, and are None where it failed."""
    due_s, text_s = outcome.arrival.due_s, outcome.text_s
    figures = {
        "due_s": round(due_s, 6),
        "lag_ms": _ms(outcome.sent_s - due_s),
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "error": outcome.error,
        "ttft_ms": None,
        "tpot_ms": None,
        "e2e_ms": None,
    }
    if outcome.error is None:
        later = outcome.output_tokens - 1
        figures["ttft_ms"], figures["e2e_ms"] = _ms(text_s[0] - due_s), _ms(outcome.end_s - due_s)
        figures["tpot_ms"] = _ms((text_s[-1] - text_s[0]) / later) if later > 0 else None
    return figures


def of_run(outcomes: Sequence[Outcome], objective: Objective) -> dict[str, Any]:
    """The figures of all requests together. itl_ms: between one piece of text and the next; tpot_ms: a token of an
    answer after its first, averaged over the answer. lag_ms: how much later than due the client itself sent."""
    good = [each for each in outcomes if each.error is None]
    each = [of_request(outcome) for outcome in outcomes]
    span_s = max((outcome.end_s for outcome in outcomes), default=0.0)
    met = sum(objective.met(outcome) for outcome in outcomes)
    values = {name: [one[name] for one in each if one[name] is not None] for name in ("ttft_ms", "tpot_ms", "e2e_ms")}
    values["itl_ms"] = between_ms(good)
    return {
        "requests": len(outcomes),
        "failed": dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        "duration_s": round(span_s, 3),
        "requests_per_s": _rate(len(good), span_s),
        "output_tokens_per_s": _rate(sum(outcome.output_tokens for outcome in good), span_s),
        "prompt_tokens": sum(outcome.prompt_tokens or 0 for outcome in good),
        "output_tokens": sum(outcome.output_tokens for outcome in good),
        "within_objective": round(met / len(outcomes), 4) if outcomes else None,
        "goodput_per_s": _rate(met, span_s),
        "lag_ms": _spread(one["lag_ms"] for one in each),
        **{name: _spread(values[name]) for name in LATENCIES},
    }


def between_ms(outcomes: Iterable[Outcome]) -> list[float]:
    return [_ms(b - a) for outcome in outcomes for a, b in pairwise(outcome.text_s)]


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    array = np.fromiter(values, np.float64)
    if not len(array):
        return None
    found = {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(array, PERCENTILES), strict=True)}
    return {name: round(v, 3) for name, v in {"mean": float(array.mean()), **found, "max": float(array.max())}.items()}


def _rate(count: int, span_s: float) -> float:
    return round(count / span_s, 4) if span_s else 0.0


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
