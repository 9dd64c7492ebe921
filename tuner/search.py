"""Which tiles of a task to try next: the default, what was best nearby, then what a cost model expects most of.

Proposals are children of the best tiles so far (one or two fields changed, or the fields of two of them mixed), and
tiles drawn at random; a gradient-boosted model of all records of the schedule ranks them (Chen and Guestrin 2016). The
loop is that of learned schedule search since AutoTVM (Chen et al. 2018) and Ansor (Zheng et al. 2020).
"""

import json
import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from tilewright.compiler.errors import TargetError
from tilewright.schedules.records import Record, text_of
from tilewright.tuner.features import features, matrix, record_features
from tilewright.tuner.tasks import Task

_PARENTS = 5
_CHILDREN = 64  # proposals that are ranked, and as many drawn at random
_EXPLORED = 0.2  # of a batch, drawn at random whatever the model says
_NEIGHBOURS = 3  # records nearby, whose tiles are tried first
_LEAST_SAMPLES = 4  # for a model
_FAILED = math.log(0.01)  # what a failure counts as, of the best
_OWN_WEIGHT = 4.0  # of a record of the task itself, beside one of another


class Search(Protocol):
    """What the sweep asks of a way to search."""

    def propose(self, task: Task, measured: Mapping[str, Record], taken: Collection[str], count: int) -> list[Any]:
        """Up to so many tiles of the task's space whose text is not in `taken`. measured: records by a tile's text."""

    def learn(self, record: Record) -> None:
        """What a candidate of any task came to."""


class RandomSearch:
    """The default first, then tiles in random order."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def propose(self, task: Task, measured: Mapping[str, Record], taken: Collection[str], count: int) -> list[Any]:
        left = [tile for tile in task.space if text_of(tile) not in taken]
        if left and left[0] == task.space[0]:
            return left[:1]
        return self._random.sample(left, min(count, len(left)))

    def learn(self, record: Record) -> None:
        pass


class ModelSearch:
    """Ranks by an XGBoost model. others: records of any task and device, to start from."""

    def __init__(self, others: Iterable[Record] = (), seed: int = 0) -> None:
        check_installed()
        self._others = list(others)
        self._random = random.Random(seed)
        self._seed = seed

    def learn(self, record: Record) -> None:
        self._others.append(record)

    def propose(self, task: Task, measured: Mapping[str, Record], taken: Collection[str], count: int) -> list[Any]:
        space = {text_of(tile): tile for tile in task.space}
        left = [text for text in space if text not in taken]
        first = text_of(task.space[0])
        if first in left:
            return [space[first]]
        if len(left) <= count:
            return [space[text] for text in left]
        chosen: dict[str, None] = dict.fromkeys(self._nearby(task, left) if len(measured) <= 1 else ())
        random_count = max(1, round(_EXPLORED * count))
        ranked = self._ranked(task, space, measured, self._proposals(space, measured, left))
        for text in ranked:
            if len(chosen) >= count - random_count:
                break
            chosen[text] = None
        rest = [text for text in left if text not in chosen]
        for text in self._random.sample(rest, min(len(rest), count - len(chosen))):
            chosen[text] = None
        return [space[text] for text in chosen]

    # ---- where to start ----------------------------------------------------------------------------------------------

    def _nearby(self, task: Task, left: Sequence[str]) -> list[str]:
        """The tiles nearest to the best ones of the nearest tasks: neighbouring facts here, or these on another GPU."""
        best = _best_by_task(r for r in self._others if r.schedule == task.schedule.name)
        facts = _flat(task.facts_text) | {"rows": task.rows}
        near = sorted(best.values(), key=lambda r: _apart(facts, _flat(r.facts) | {"rows": r.rows}))
        tiles = [_flat(record.tile) for record in near[:_NEIGHBOURS]]
        return list(dict.fromkeys(min(left, key=lambda text: _apart(_flat(text), tile)) for tile in tiles))

    # ---- proposals ---------------------------------------------------------------------------------------------------

    def _proposals(self, space: Mapping[str, Any], measured: Mapping[str, Record], left: Sequence[str]) -> list[str]:
        """What the schedule itself expects most of, children of the best, and tiles drawn at random."""
        first = left[:_CHILDREN]
        good = sorted((r for t, r in measured.items() if r.us is not None and t in space), key=lambda r: r.us or 0.0)
        parents = [_flat(record.tile) for record in good[:_PARENTS]]
        drawn = self._random.sample(left, min(_CHILDREN, len(left)))
        if not parents:
            return list(dict.fromkeys([*first, *drawn]))
        by_fields = {_frozen(_flat(text)): text for text in left}
        crossed = (self._crossed(parents) for _ in range(4 * _CHILDREN))
        children = [by_fields[child] for child in crossed if child in by_fields]
        # A tile's fields hang together, so a changed one is seldom in the space: the space's own nearest instead.
        mutated = sorted(left, key=lambda text: min(_apart(_flat(text), parent) for parent in parents))[:_CHILDREN]
        return list(dict.fromkeys([*first, *children, *mutated, *drawn]))

    def _crossed(self, parents: Sequence[Mapping[str, Any]]) -> frozenset[tuple[str, Any]]:
        a, b = self._random.choice(parents), self._random.choice(parents)
        return _frozen({name: self._random.choice((a, b)).get(name, value) for name, value in a.items()})

    # ---- the model ---------------------------------------------------------------------------------------------------

    def _ranked(
        self, task: Task, space: Mapping[str, Any], measured: Mapping[str, Record], proposals: Sequence[str]
    ) -> list[str]:
        """The proposals, those that should be fastest first; in the space's own order where too little is known."""
        places = {text: i / len(space) for i, text in enumerate(space)}
        examples = self._examples(task, space, places, measured)
        if len(examples) < _LEAST_SAMPLES:
            return sorted(proposals, key=places.__getitem__)
        import numpy as np
        import xgboost

        rows = [self._features(task, space[text], places[text]) for text in proposals]
        _, values = matrix([row for row, _, _ in examples] + rows)
        known = np.array(values[: len(examples)])
        labels, weights = (np.array([example[i] for example in examples]) for i in (1, 2))
        settings = {"max_depth": 5, "eta": 0.2, "subsample": 0.9, "nthread": 1, "seed": self._seed}
        model = xgboost.train(settings, xgboost.DMatrix(known, labels, weight=weights), num_boost_round=60)
        scores = model.predict(xgboost.DMatrix(np.array(values[len(examples) :])))
        return [text for _, text in sorted(zip(-scores, proposals, strict=True), key=lambda pair: (pair[0], pair[1]))]

    def _examples(
        self, task: Task, space: Mapping[str, Any], places: Mapping[str, float], measured: Mapping[str, Record]
    ) -> list[tuple[dict[str, float], float, float]]:
        """Features, the logarithm of the best time of its task and device over this one, weight: what is compared are
        the tiles of a task, whatever the device and the task can reach."""
        own = {text: record for text, record in measured.items() if text in space}
        here = {record.device for record in own.values()}
        others = [
            r
            for r in self._others
            if r.schedule == task.schedule.name and ((r.facts, r.rows) != task.key[1:] or r.device not in here)
        ]
        best = _best_by_task([*own.values(), *others])
        classes = {type(tile).__name__: type(tile) for tile in space.values()}
        examples = [
            (self._features(task, space[text], places[text]), _label(record, best), _OWN_WEIGHT)
            for text, record in own.items()
        ]
        return examples + [(record_features(r, classes, task.target), _label(r, best), 1.0) for r in others]

    def _features(self, task: Task, tile: Any, place: float) -> dict[str, float]:
        """place: in the space, whose order is the schedule's own guess."""
        found = features(tile, json.loads(task.facts_text), task.rows, *task.work(task.rows), task.target)
        return {**found, "place": place}


def _best_by_task(records: Iterable[Record]) -> dict[tuple[Any, ...], Record]:
    """The fastest record of each task on each device."""
    best: dict[tuple[Any, ...], Record] = {}
    for record in records:
        place = (record.device, *record.task)
        known = best.get(place)
        if record.us is not None and (known is None or record.us < (known.us or math.inf)):
            best[place] = record
    return best


def _label(record: Record, best: Mapping[tuple[Any, ...], Record]) -> float:
    known = best.get((record.device, *record.task))
    if record.us is None or known is None or known.us is None:
        return _FAILED
    return math.log(known.us / record.us)


def check_installed() -> None:
    """Raises TargetError where XGBoost is not there."""
    from importlib.util import find_spec

    if find_spec("xgboost") is None:
        raise TargetError("tuning ranks candidates by xgboost, which is not installed; pip install 'tilewright[tune]'")


def _flat(text: str) -> dict[str, Any]:
    """The values in facts or a tile, by where they stand."""
    found: dict[str, Any] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{name}.{key}", inner)
        else:
            found[name] = tuple(value) if isinstance(value, list) else value

    visit("", json.loads(text))
    return found


def _frozen(fields: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(fields.items())


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """How far two sets of fields are from each other: octaves between numbers, 2 for anything else that differs."""
    total = 0.0
    for name in a.keys() | b.keys():
        x, y = a.get(name), b.get(name)
        if x == y:
            continue
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in (x, y))
        total += abs(math.log2(x / y)) if numbers else 2.0  # type: ignore[operator]
    return total
