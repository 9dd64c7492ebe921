"""What passes ask schedules for, and kernels of which the number of rows picks one."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """A composite call as schedules see it. m: the leading (token or row) extent where it is static, else None;
    m_max: its upper bound. Both count rows of the first tensor argument that carries tokens. inner: the dimensions of
    that argument between its rows and its last, such as the heads where each is normalised. decode: every token is a
    generated one of a sequence of its own. rows: how many rows to pick a tile for, at most m_max."""

    composite: str
    spec: Any
    m: int | None
    m_max: int
    inner: tuple[int, ...] = ()
    decode: bool = False
    rows: int = 0

    def __post_init__(self) -> None:
        if not self.rows:
            object.__setattr__(self, "rows", self.m_max)


@dataclass(frozen=True)
class Part:
    """A kernel for at most so many rows, and the tile that it was made with."""

    rows: int
    func: Any  # tvm.tirx.PrimFunc, or one that is written down later (schedules/base.py)
    tile: Any

    @property
    def content(self) -> str | None:
        """A hash of the kernel where it is not written down yet; None where it is."""
        return getattr(self.func, "content", None)


@dataclass(frozen=True)
class ByRows:
    """Kernels of one signature, of which a call runs the first that is for as many rows as its first argument has. All
    give the same bits, so which one runs shows in the time alone."""

    parts: tuple[Part, ...]
