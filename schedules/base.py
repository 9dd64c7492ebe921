"""What a schedule is: it matches a composite call, spans a space of tiles, states its floor, and makes kernels.

match(call, target) -> Facts | Reject      does it fit? A rejection's reason reaches the user when nothing matches
space(facts, target) -> tiles              the candidates, best guess first; each tile checks itself
floor(facts, target) -> Floor              bytes and operations no implementation can do without
apply(facts, tile) -> Lowering             the kernels, and how they are called
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

from tilewright.compiler.calls import ByRows as ByRows
from tilewright.compiler.calls import Call as Call
from tilewright.compiler.calls import Part as Part
from tilewright.compiler.codegen.tvm_parser import spare_frames
from tilewright.compiler.targets.base import Target


@dataclass(frozen=True)
class Reject:
    """Why a schedule does not fit."""

    reason: str


@dataclass(frozen=True)
class Floor:
    """The least traffic and work of one call with m rows: weights and constants once, plus a part per row."""

    bytes_fixed: int
    bytes_per_row: int = 0
    flops_per_row: int = 0


@dataclass(frozen=True)
class Output:
    """A tensor that a kernel writes. A dimension is a number or "m", the call's leading extent."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@cache
def _source(folder: Path) -> str:
    """A hash of the source code in a folder, and of this file."""
    code = b"".join(file.read_bytes() for file in (Path(__file__), *sorted(folder.glob("*.py"))))
    return hashlib.sha256(code).hexdigest()


@dataclass(frozen=True)
class Deferred:
    """A kernel that is written down only where it has to be compiled, since that takes up to a second.

    key: text that, with the source code in `folder`, decides what `make` returns: two kernels of one key are one.
    """

    key: str
    make: Callable[[], Any] = field(compare=False)
    folder: Path

    @property
    def content(self) -> str:
        """A hash of what `make` returns, as far as it is known without calling it: 64 bits in hexadecimal."""
        return hashlib.sha256(f"{_source(self.folder)} {self.key}".encode()).hexdigest()[:16]


def deferred(write: Callable[..., Any]) -> Callable[..., Deferred]:
    """For a function that writes a kernel down from frozen values, with what its own folder has and no other schedule:
    its calls give Deferred kernels."""
    folder = Path(write.__code__.co_filename).parent

    @wraps(write)
    def named(*args: Any) -> Deferred:
        return Deferred(f"{write.__module__}.{write.__qualname__} {args!r}", partial(write, *args), folder)

    return named


@dataclass(frozen=True)
class KernelCall:
    """One kernel launch: `func` takes the inputs, then the outputs, in order.

    An input is the index of an argument of the composite call, or the name of an output of an earlier kernel of the
    same lowering. A kernel may write into an argument only where the composite says so (pages), and into an earlier
    kernel's output. Where nothing is launched, since a later kernel does the work as well, the output is the first
    input. A `shared` kernel reads only what is the same in every layer, such as positions: of equal calls in one
    function only the first is made.
    """

    func: Any  # tvm.tirx.PrimFunc, or a Deferred one, or ByRows; None: nothing is launched
    inputs: tuple[int | str, ...]
    outputs: tuple[Output, ...]
    shared: bool = False

    @property
    def content(self) -> str | None:
        """A hash of the kernel that is not written down yet; None for one that is."""
        return self.func.content if isinstance(self.func, Deferred) else None

    def written(self) -> Any:
        """The PrimFunc, where there is one."""
        if not isinstance(self.func, Deferred):
            return self.func
        spare_frames()
        return self.func.make()


@dataclass(frozen=True)
class Lowering:
    """Kernels in order, and what the call returns: names of outputs, or the index of an argument updated in place."""

    kernels: tuple[KernelCall, ...]
    results: tuple[int | str, ...]

    def launched(self) -> "Lowering":
        """Without the calls that launch nothing."""
        instead = {k.outputs[0].name: k.inputs[0] for k in self.kernels if k.func is None}
        kernels = [k for k in self.kernels if k.func is not None]
        inputs = [tuple(instead.get(i, i) if isinstance(i, str) else i for i in k.inputs) for k in kernels]
        return Lowering(tuple(replace(k, inputs=i) for k, i in zip(kernels, inputs, strict=True)), self.results)


class Schedule(ABC):
    """One way to run one composite on one kind of target. Subclasses are stateless; `name` is also the file's name."""

    name: str
    composite: str
    kind: str  # the target kind it is for
    most_tiles: int | None = None  # that are tried, where a search makes up tiles beyond the space's

    @abstractmethod
    def match(self, call: Call, target: Target) -> Any:
        """A frozen Facts value, or a Reject."""

    @abstractmethod
    def space(self, facts: Any, target: Target) -> Sequence[Any]:
        """Valid tiles, the default first. Never empty."""

    def tile_of(self, fields: Mapping[str, Any]) -> Any:
        """A tile of these fields that is none of the space's: only of schedules with `most_tiles`."""
        raise TypeError(f"all tiles of {self.name} are in its space")

    def bounds(self, call: Call, target: Target) -> Sequence[int]:
        """Numbers of rows, increasing, up to each of which a call of open size has a tile of its own. Lowerings for
        them differ in nothing but their kernels. None for schedules whose kernels suit any number."""
        return ()

    @abstractmethod
    def floor(self, facts: Any, target: Target) -> Floor: ...

    @abstractmethod
    def apply(self, facts: Any, tile: Any, target: Target) -> Lowering: ...
