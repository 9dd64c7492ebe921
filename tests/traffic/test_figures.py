"""Percentiles and goodput of outcomes whose times are known."""

import pytest

from tilewright.traffic.arrivals import Arrival
from tilewright.traffic.client import Outcome
from tilewright.traffic.figures import Objective, of_request, of_run


def outcome(due_s: float, first_s: float, pieces: int, gap_s: float, error: str | None = None) -> Outcome:
    text_s = [first_s + i * gap_s for i in range(pieces)]
    return Outcome(Arrival(due_s, 10, pieces), due_s + 0.001, text_s[-1] + 0.002, text_s, 10, pieces, error)


def test_a_request_is_timed_from_when_it_was_due() -> None:
    figures = of_request(outcome(2.0, 2.5, 11, 0.02))
    assert figures["lag_ms"] == pytest.approx(1)
    assert figures["ttft_ms"] == pytest.approx(500)
    assert figures["tpot_ms"] == pytest.approx(20)
    assert figures["e2e_ms"] == pytest.approx(702)


def test_pieces_of_several_tokens_count_as_tokens() -> None:
    held = outcome(0.0, 1.0, 3, 0.5)
    held.output_tokens = 11
    assert of_request(held)["tpot_ms"] == pytest.approx(100)


def test_an_answer_of_one_token_has_no_time_a_token() -> None:
    single = outcome(0.0, 0.1, 1, 0.0)
    assert of_request(single)["tpot_ms"] is None
    assert Objective(200, 1).met(single)


@pytest.mark.parametrize(
    ("objective", "met"),
    [
        (Objective(500.1, 20.1), 3),
        (Objective(499, 20.1), 1),
        (Objective(500.1, 19), 1),
        (Objective(500.1, 30.1), 4),
        (Objective(500.1, 30.1, 500), 1),
    ],
)
def test_goodput_counts_what_meets_every_objective(objective: Objective, met: int) -> None:
    outcomes = [
        outcome(0.0, 0.5, 11, 0.02),
        outcome(1.0, 1.5, 11, 0.02),
        outcome(1.5, 1.6, 11, 0.01),
        outcome(2.0, 2.5, 11, 0.03),
        outcome(3.0, 3.1, 2, 0.01, error="timed out"),
    ]
    run = of_run(outcomes, objective)
    assert run["within_objective"] == met / 5
    assert run["goodput_per_s"] == pytest.approx(met / run["duration_s"], rel=1e-3)


def test_the_figures_of_a_run() -> None:
    outcomes = [outcome(0.0, 0.1 * (i + 1), 11, 0.01) for i in range(100)] + [outcome(0.0, 1.0, 1, 0.0, "refused")]
    run = of_run(outcomes, Objective(1000, 100))
    assert run["ttft_ms"] == {
        "mean": pytest.approx(5050), "p50": pytest.approx(5050), "p90": pytest.approx(9010),
        "p95": pytest.approx(9505), "p99": pytest.approx(9901), "max": pytest.approx(10000),
    }  # fmt: skip
    assert run["itl_ms"]["p99"] == pytest.approx(10)
    assert run["failed"] == {"refused": 1} and run["requests"] == 101 and run["output_tokens"] == 1100
    assert run["output_tokens_per_s"] == pytest.approx(1100 / run["duration_s"], rel=1e-3)


def test_a_run_in_which_all_failed_has_no_latencies() -> None:
    run = of_run([outcome(0.0, 1.0, 1, 0.0, "refused")], Objective(1, 1))
    assert run["ttft_ms"] is run["itl_ms"] is None and run["within_objective"] == 0
