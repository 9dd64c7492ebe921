"""Numbers that a candidate's time may depend on: of its tile, its facts, and how it fills the device."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from tilewright.compiler.targets.base import Target
from tilewright.schedules.records import Record

_SM_THREADS = 2048  # that are resident on a multiprocessor


def features(
    tile: Any, facts: Mapping[str, Any], rows: int, size: int, operations: int, target: Target
) -> dict[str, float]:
    """tile: a tile, or its fields where its class is not known. size, operations: a call's floor."""
    found = dict(_numbers("tile", tile))
    found |= dict(_numbers("facts", facts))
    found |= {
        "rows": rows,
        "log bytes": math.log2(size + 1),
        "log operations": math.log2(operations + 1),
        "intensity": operations / max(size, 1),
        "sms": target.sms,
        "gbs": target.bandwidth_gbs or 0.0,
        "tops": target.matrix_tops or 0.0,
    }
    found |= _wasted(found, rows)
    threads, shared, blocks = (found.get(f"tile.{name}") for name in ("threads", "shared_bytes", "blocks"))
    if target.sms and threads and shared:
        resident = max(1, min(_SM_THREADS // int(threads), target.shared_memory_bytes // max(1, int(shared))))
        found["occupancy"] = resident * threads / _SM_THREADS
        if blocks:
            found["waves"] = blocks / (resident * target.sms)
    return found


def _wasted(found: Mapping[str, float], rows: int) -> dict[str, float]:
    """How much larger than the extents whole tiles are, for each number of a tile beside the rows and the outputs."""
    extents = {"rows": float(rows)} | {n: v for n, v in found.items() if n.endswith((".out_features", ".features"))}
    return {
        f"{extent} in {name}": math.ceil(size / value) * value / size
        for name, value in found.items()
        if name.startswith("tile.") and value >= 2
        for extent, size in extents.items()
        if size
    }


def record_features(record: Record, classes: Mapping[str, type], target: Target) -> dict[str, float]:
    """Those of a record that another sweep left."""
    tile = json.loads(record.tile)
    kind = classes.get(tile.pop("is"))
    made: Any = tile
    if kind is not None:
        try:
            made = kind(**tile)
        except (TypeError, ValueError):  # of fields that are objects, or of an older class
            made = tile
    return features(made, json.loads(record.facts), record.rows, record.bytes, record.operations, target)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a value and in what it is made of, a tile's properties among them, by where they stand."""
    if isinstance(value, bool | int | float):
        yield name, float(value)
    elif isinstance(value, str):
        yield f"{name}={value}", 1.0
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name}.{key}", inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for key in (*(f.name for f in dataclasses.fields(value)), *_properties(type(value))):
            yield from _numbers(f"{name}.{key}", getattr(value, key))


@cache
def _properties(kind: type) -> tuple[str, ...]:
    return tuple(name for name, value in vars(kind).items() if isinstance(value, property))


def matrix(rows: Sequence[Mapping[str, float]]) -> tuple[list[str], list[list[float]]]:
    """Columns by name, and a row for each; what a row does not have is NaN."""
    names = sorted({name for row in rows for name in row})
    return names, [[row.get(name, math.nan) for name in names] for row in rows]
