"""bench/tune.py race: what a line says of searches that come near the best and of others, by made-up times."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tune import planted
from tilewright.compiler.composites import LinearSpec, NormSpec
from tilewright.tuner import loops

BENCH = Path(__file__).parent.parent.parent / "bench"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def test_the_first_candidate_near_the_best_of_all_counts(tmp_path: Path) -> None:
    from cases import TUNE_CASES
    from results_file import Results
    from tune_race import Point, report

    found = {
        "ours": [Point(1.0, 1, 30.0), Point(2.0, 2, 10.4), Point(3.0, 3, 10.0)],
        "theirs": [Point(4.0, 1, None), Point(9.0, 2, 20.0)],
        "lost": [Point(5.0, 1, None)],
    }
    file = tmp_path / "lines.jsonl"
    report(planted.task((300,)), found, 0.95, Results(file, TUNE_CASES, {}))
    ours, theirs, lost = map(json.loads, file.read_text().splitlines())
    assert (ours["median"], ours["trials"], ours["within"], ours["reached"]) == (2.0, 2, True, 1.0)
    assert (theirs["median"], theirs["trials"], theirs["within"], theirs["reached"]) == (9.0, 2, False, 0.5)
    assert (theirs["best_known_us"], theirs["failed"]) == (10.0, 1)
    assert (lost["best_us"], lost["reached"], lost["within"]) == (None, 0.0, False)


def test_the_plain_loops_compute_the_linear() -> None:
    from tune_race import plain_function

    spec = LinearSpec(5, 16, "f16_rows", norm=NormSpec(16, 1e-5), residual=True)
    func, shapes, dtypes = plain_function(spec, 3)
    assert shapes == ((3, 16), (5, 16), (16,), (3, 5), (3, 5)) and dtypes[1] == "float16"
    rng = np.random.default_rng()
    x, weight, norm, residual, y = (rng.standard_normal(s).astype(d) for s, d in zip(shapes, dtypes, strict=True))
    loops.run(loops.written(func), [x, weight, norm, residual, y])
    scaled = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * norm
    np.testing.assert_allclose(y, scaled @ weight.T.astype(np.float32) + residual, rtol=1e-4, atol=1e-5)
