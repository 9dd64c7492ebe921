"""What came out of a candidate, as a record says it."""

import time
from dataclasses import dataclass, replace

from tilewright.schedules.records import Record
from tilewright.tuner.candidates import Failure
from tilewright.tuner.measuring import Timing


@dataclass(frozen=True)
class Provenance:
    """What records say of where they were made. versions: canonical JSON."""

    device: str
    driver: str
    versions: str


def finished(record: Record, tile: str, outcome: Timing | Failure, floor_us: float | None, date: str) -> Record:
    """A template with what came out of a tile."""
    if isinstance(outcome, Failure):
        return replace(record, tile=tile, failure=outcome.kind, detail=outcome.detail, date=date)
    return replace(
        record,
        tile=tile,
        us=outcome.us,
        spread_us=outcome.spread_us,
        of_floor=None if floor_us is None else round(floor_us / outcome.us, 4),
        clock_mhz=outcome.clock_mhz,
        temperature_c=outcome.temperature_c,
        date=date,
    )


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
