"""What is tried next: never twice, the default first, and the best sooner than by chance."""

import math
from collections.abc import Callable
from statistics import mean
from typing import Any

import pytest

from tests.tune.examples import DEVICE
from tilewright.compiler.calls import Call
from tilewright.compiler.composites import LinearSpec
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.cuda.linear import Linear
from tilewright.schedules.records import Record, text_of
from tilewright.tuner import search
from tilewright.tuner.features import features, matrix, record_features
from tilewright.tuner.measuring import Timing
from tilewright.tuner.outcomes import Provenance, finished
from tilewright.tuner.search import ModelSearch, RandomSearch, Search
from tilewright.tuner.sweep import known_floor_us, template
from tilewright.tuner.tasks import Task

H100 = RECORDS["nvidia-h100"]
BY = Provenance(DEVICE, "", "{}")


def linear(n: int, k: int, rows: int) -> Task:
    spec = LinearSpec(n, k, "bf16_rows", dtype="bfloat16", out_dtype="bfloat16")
    call = Call("linear", spec, rows, rows)
    return Task(Linear(), Linear().match(call, H100), call, H100, calls=1.0, load_us=1.0)


def truth(task: Task, tile: Any) -> float:
    """A made-up machine's microseconds: it likes tiles of 96 by 160, deep rings, and pairs of blocks."""
    off = abs(math.log2(tile.rows / 96)) + abs(math.log2(tile.tokens / 160)) + 0.2 * abs(tile.stages - 5)
    return task.floor_us * (1.1 + 0.3 * off + 0.2 * (tile.cluster == 1))


def run(task: Task, tried: Search, until_us: float, batch: int = 8) -> list[Record]:
    """Measures by `truth` until a time is reached, or all is tried."""
    measured: dict[str, Record] = {}
    taken: set[str] = set()
    while len(measured) < len(task.space):
        for tile in tried.propose(task, measured, taken, batch):
            assert tile in task.space and text_of(tile) not in taken
            taken.add(text_of(tile))
            us = truth(task, tile)
            record = finished(template(task, BY), text_of(tile), Timing(us, (us, us)), known_floor_us(task), "")
            measured[text_of(tile)] = record
            tried.learn(record)
            if us <= until_us:
                return list(measured.values())
    return list(measured.values())


TASK = linear(4096, 4096, 512)
CLOSE_US = min(truth(TASK, tile) for tile in TASK.space) / 0.97


def trials(make: Callable[[int], Search]) -> float:
    return mean(len(run(TASK, make(seed), CLOSE_US)) for seed in range(5))


@pytest.mark.parametrize("make", [RandomSearch, lambda: ModelSearch()], ids=["random", "model"])
def test_the_default_comes_first_and_every_tile_once(make: Callable[[], Search]) -> None:
    found = run(TASK, make(), 0.0)
    assert found[0].tile == TASK.default_text
    assert {record.tile for record in found} == {text_of(tile) for tile in TASK.space}
    assert make().propose(TASK, {}, {text_of(tile) for tile in TASK.space}, 8) == []


def test_the_model_needs_fewer_trials_than_chance() -> None:
    by_chance, by_model = trials(RandomSearch), trials(lambda seed: ModelSearch(seed=seed))
    assert len(TASK.space) > 60
    assert by_model < 0.7 * by_chance, (by_model, by_chance)


def test_records_of_a_neighbour_help() -> None:
    neighbour = run(linear(6144, 4096, 512), ModelSearch(), 0.0)
    alone, helped = trials(lambda seed: ModelSearch(seed=seed)), trials(lambda seed: ModelSearch(neighbour, seed))
    assert helped < 0.7 * alone, (helped, alone)
    second = ModelSearch(neighbour).propose(TASK, {}, {TASK.default_text}, 8)
    assert min(truth(TASK, tile) for tile in second) <= CLOSE_US  # the neighbour's best, or one like it


def test_the_same_seed_proposes_the_same() -> None:
    a, b = (run(TASK, ModelSearch(seed=3), CLOSE_US) for _ in range(2))
    assert [r.tile for r in a] == [r.tile for r in b]


def test_failures_are_avoided() -> None:
    """Where tiles of one warpgroup crash, hardly any of the later proposals is one."""
    measured = {}
    for i, tile in enumerate(TASK.space):
        if i % 3 == 0:
            us = None if tile.bands == 1 else truth(TASK, tile)
            record = template(TASK, BY)
            failed = Record(**{**record.__dict__, "tile": text_of(tile), "us": us, "failure": "" if us else "crash"})
            measured[text_of(tile)] = failed
    proposed = ModelSearch().propose(TASK, measured, set(measured), 20)
    assert sum(tile.bands == 1 for tile in proposed) <= 6
    assert sum(tile.bands == 1 for tile in TASK.space) > len(TASK.space) / 2


def test_features_tell_how_a_tile_fills_the_device() -> None:
    tile = TASK.space[0]
    found = features(tile, {"spec": {"out_features": 4096}}, 512, *TASK.work(512), H100)
    assert found["tile.rows"] == tile.rows and found["tile.shared_bytes"] == tile.shared_bytes
    assert found["facts.spec.out_features"] == 4096
    assert 0 < found["occupancy"] <= 1 and found["waves"] > 0
    assert found["intensity"] == pytest.approx(TASK.work(512)[1] / TASK.work(512)[0])
    size, operations = TASK.work(512)
    record = Record(**{**template(TASK, BY).__dict__, "tile": text_of(tile), "bytes": size, "operations": operations})
    same = record_features(record, {type(tile).__name__: type(tile)}, H100)
    assert {name: same[name] for name in found if not name.startswith("facts")} == {
        name: value for name, value in found.items() if not name.startswith("facts")
    }
    names, rows = matrix([{"a": 1.0}, {"b": 2.0}])
    assert names == ["a", "b"] and math.isnan(rows[0][1]) and rows[1][1] == 2.0


def test_without_xgboost_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"xgboost, which is not installed; pip install 'tilewright\[tune\]'"):
        search.check_installed()
