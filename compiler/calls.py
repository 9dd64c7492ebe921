"""What passes ask schedules for, and kernels of which the number of rows picks one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright.compiler.composites import load_spec

# The argument whose leading extent counts a call's rows, where it is not the first.
_ROWS_ARGUMENT = {"embedding": 1, "kv_append": 1}


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


def rows_extents(mod: Any, call: Any) -> Any:
    """The shape of the argument whose leading extent counts the rows of a composite call of a module."""
    composite = str(mod[call.op].attrs["tw.composite"])
    return call.args[_ROWS_ARGUMENT.get(composite, 0)].ty.shape.values


def call_of(mod: Any, call: Any, bounds: Mapping[str, int], decode: bool) -> Call:
    """What a composite call of a module asks for. bounds: of its function's symbolic extents, by name."""
    attrs = mod[call.op].attrs
    composite = str(attrs["tw.composite"])
    rows, *others = rows_extents(mod, call)
    static = int(rows.value) if hasattr(rows, "value") else None
    inner = tuple(int(extent.value) for extent in others[:-1])
    spec = load_spec(composite, str(attrs["tw.spec"]))
    return Call(composite, spec, static, static or bounds[rows.name], inner, decode)


def bounds_of(func: Any) -> dict[str, int]:
    """The bounds of a function's symbolic extents, by name."""
    return {str(k): int(v) for k, v in (func.attrs or {}).get("tir_var_upper_bound", {}).items()}


@dataclass(frozen=True)
class Part:
    """A kernel for at most so many rows, and the tile that it was made with. record: where the tuning record stands
    that the tile was taken from, "" for a default."""

    rows: int
    func: Any  # tvm.tirx.PrimFunc, or one that is written down later (schedules/base.py); None: nothing is launched
    tile: Any
    record: str = ""

    @property
    def content(self) -> str | None:
        """A hash of the kernel where it is not written down yet; None where it is."""
        return getattr(self.func, "content", None)


@dataclass(frozen=True)
class ByRows:
    """Kernels of one signature, of which a call runs the first that is for as many rows as its first argument has. All
    give the same bits, so which one runs shows in the time alone."""

    parts: tuple[Part, ...]
