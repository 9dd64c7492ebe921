"""Arrivals: drawn at the rate and with the spread that is asked, and traces read as they are."""

from pathlib import Path

import numpy as np
import pytest

from tilewright.compiler.errors import UserError
from tilewright.traffic.arrivals import Arrival, at_rate, drawn, mean_rate, read_trace

HEAD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variance_of_their_gamma(shape: float) -> None:
    arrivals = drawn(5.0, 20_000, shape, 128, 64, seed=3)
    gaps = np.diff([0.0, *(each.due_s for each in arrivals)])
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.var() == pytest.approx(1 / 25 / shape, rel=0.15)
    assert {(each.prompt_tokens, each.output_tokens) for each in arrivals} == {(128, 64)}


def test_a_seed_decides() -> None:
    first, again, other = (drawn(1.0, 9, 1.0, 1, 1, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_trace_is_read_by_time_without_what_failed(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    rows = "45,ChatGPT,300,20,320,API log\n5,GPT-4,472,18,490,Conversation log\n6,GPT-4,9,0,9,API log\n"
    file.write_text(HEAD + rows)
    assert read_trace(file) == ([Arrival(0.0, 472, 18), Arrival(40.0, 300, 20)], 1)
    assert read_trace(file, 1) == ([Arrival(0.0, 472, 18)], 1)


def test_another_rate_keeps_the_pattern() -> None:
    arrivals = [Arrival(0.0, 1, 1), Arrival(3.0, 2, 2), Arrival(4.0, 3, 3)]
    assert mean_rate(arrivals) == 0.5
    assert [each.due_s for each in at_rate(arrivals, 2.0)] == [0.0, 0.75, 1.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column 'Timestamp'"),
        ("Timestamp,Request tokens\n1,2\n", "has no column 'Response tokens'"),
        (HEAD, "has no request with response tokens"),
        (HEAD + "1,a,5,0,5,x\n", "has no request with response tokens"),
        (HEAD + "1,a,5,6,5,x\nsoon,a,5,6,5,x\n", "line 3 of the trace .* has Timestamp 'soon'"),
        (HEAD + "1,a,-5,6,5,x\n", "has Request tokens '-5'"),
        (HEAD + "1,a,nan,6,5,x\n", "has Request tokens 'nan'"),
        (HEAD + "1,a\n", "has Request tokens ''"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_trace(file)


def test_traces_that_can_not_be_read(tmp_path: Path) -> None:
    file = tmp_path / "latin.csv"
    file.write_bytes(HEAD.encode() + b"1,\xff,5,6,11,x\n")
    for bad in (file, tmp_path / "absent.csv", tmp_path):
        with pytest.raises(UserError, match="can't be read"):
            read_trace(bad)
    with pytest.raises(UserError, match="at one moment"):
        mean_rate([Arrival(0.0, 1, 1)])
