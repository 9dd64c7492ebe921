"""Records of a made-up schedule, for the tests of what reads and writes them."""

from dataclasses import dataclass, replace
from typing import Any

from tilewright.schedules.records import Record, space_hash, text_of

DEVICE = "Made Up 9000, 4 cores"
FOLDER = "made-up-9000-4-cores"


@dataclass(frozen=True)
class Tile:
    width: int


@dataclass(frozen=True)
class Facts:
    n: int


SPACE = (Tile(1), Tile(2), Tile(4))


def record(width: int = 2, us: float | None = 10.0, n: int = 7, rows: int = 8, **fields: Any) -> Record:
    made = Record(
        device=DEVICE,
        target="cpu x86_64 avx2",
        schedule="made_up",
        facts=text_of(Facts(n)),
        rows=rows,
        space=space_hash(SPACE),
        tile=text_of(Tile(width)),
        us=us,
        spread_us=(us, us + 1) if us else None,
        failure="" if us else "crash",
        date="2026-01-31T12:00:00Z",
    )
    return replace(made, **fields)
