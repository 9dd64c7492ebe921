"""What a plain operator computes, taken from its loops before anything is scheduled, and computed by numpy.

`written` reads a PrimFunc of static extents and needs TVM; `run` needs numpy alone. What they share is JSON: buffers
that are allocated, and a list of blocks, each of which stores one value for every point of its iteration space. Values
are lists: ["number", 2.0], ["at", 0] (an iteration variable), ["load", buffer, [indices]], ["cast", dtype, value],
["select", condition, a, b], [operator, values ...].
"""

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from tilewright.tuner.problem_base import numpy_dtype

Array = np.ndarray


class Unknown(Exception):
    """What has no reference here."""


_BINARY: Mapping[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.true_divide,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
}
_CALLS: Mapping[str, Callable[..., Any]] = {
    "tirx.cos": np.cos,
    "tirx.sin": np.sin,
    "tirx.exp": np.exp,
    "tirx.log": np.log,
    "tirx.sqrt": np.sqrt,
    "tirx.rsqrt": lambda x: 1 / np.sqrt(x),
    "tirx.tanh": np.tanh,
    "tirx.sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tirx.fabs": np.abs,
    "tirx.pow": np.power,
}
_OPERATORS: Mapping[str, Callable[..., Any]] = {**_BINARY, **_CALLS}


# ---- from TVM --------------------------------------------------------------------------------------------------------


def written(func: Any) -> str:
    """The loops of a PrimFunc with static extents. Raises Unknown where they hold anything else than stores."""
    return json.dumps(_Writer(func).program)


class _Writer:
    def __init__(self, func: Any) -> None:
        self._names = {param: f"p{i}" for i, param in enumerate(func.params)}
        self._iterators: dict[Any, int] = {}
        self.program: dict[str, Any] = {"buffers": {}, "blocks": []}
        self._visit(func.body)

    def _visit(self, node: Any) -> None:
        kind = type(node).__name__
        if kind == "SeqStmt":
            for each in node.seq:
                self._visit(each)
        elif kind == "For":
            self._visit(node.body)
        elif kind == "SBlockRealize":
            self._visit(node.block)
        elif kind == "SBlock" and not node.iter_vars:
            for buffer in node.alloc_buffers:
                self._names[buffer] = f"b{len(self._names)}"
                about = [[int(n) for n in buffer.shape], str(buffer.dtype)]
                self.program["buffers"][self._names[buffer]] = about
            self._visit(node.body)
        elif kind == "SBlock" and type(node.body).__name__ == "BufferStore":
            self.program["blocks"].append(self._block(node))
        else:
            raise Unknown(kind)

    def _block(self, block: Any) -> dict[str, Any]:
        self._iterators = {iterator.var: i for i, iterator in enumerate(block.iter_vars)}
        store = block.body
        made = {
            "extents": [int(iterator.dom.extent) for iterator in block.iter_vars],
            "reduced": [i for i, iterator in enumerate(block.iter_vars) if int(iterator.iter_type) == _REDUCED],
            "into": self._names[store.buffer],
            "indices": [self._value(index) for index in store.indices],
            "value": self._value(store.value),
        }
        if block.init is not None:
            made["first"] = self._value(block.init.value)
        return made

    def _value(self, value: Any) -> list[Any]:
        kind = type(value).__name__
        if kind in ("IntImm", "FloatImm"):
            return ["number", value.value]
        if kind == "Var" and value in self._iterators:
            return ["at", self._iterators[value]]
        if kind == "TensorLoad":
            return ["load", self._names[value.source], [self._value(index) for index in value.indices]]
        if kind == "Cast":
            return ["cast", str(value.ty), self._value(value.value)]
        if kind == "Select":
            return ["select", *map(self._value, (value.condition, value.true_value, value.false_value))]
        if kind in _BINARY:
            return [kind, self._value(value.a), self._value(value.b)]
        if kind == "Call" and getattr(value.op, "name", "") in _CALLS:
            return [value.op.name, *map(self._value, value.args)]
        raise Unknown(getattr(getattr(value, "op", None), "name", kind))


_REDUCED = 2  # an iteration variable's kind, as TVM numbers them


# ---- by numpy --------------------------------------------------------------------------------------------------------


def run(program: str, buffers: Sequence[Array]) -> None:
    """Computes into the last of `buffers`, which stand for the PrimFunc's parameters."""
    loops = json.loads(program)
    named = {f"p{i}": buffer for i, buffer in enumerate(buffers)}
    named |= {name: np.zeros(shape, numpy_dtype(dtype)) for name, (shape, dtype) in loops["buffers"].items()}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for block in loops["blocks"]:
            _run_block(block, named)


def _run_block(block: Mapping[str, Any], buffers: Mapping[str, Array]) -> None:
    """All points of the spatial iterators at once, the reduced ones one after the other."""
    extents, reduced, into = block["extents"], block["reduced"], buffers[block["into"]]
    spatial = [i for i in range(len(extents)) if i not in reduced]
    at: list[Any] = [0] * len(extents)
    for place, i in enumerate(spatial):
        at[i] = np.arange(extents[i]).reshape([-1 if p == place else 1 for p in range(len(spatial))])
    shape = [extents[i] for i in spatial]

    def store(value: list[Any]) -> None:
        indices = tuple(np.broadcast_to(_compute(index, at, buffers), shape) for index in block["indices"])
        into[indices] = np.broadcast_to(_compute(value, at, buffers), shape).astype(into.dtype)

    if "first" in block:
        store(block["first"])
    for point in np.ndindex(*(extents[i] for i in reduced)):
        for i, index in zip(reduced, point, strict=True):
            at[i] = index
        store(block["value"])


def _compute(value: list[Any], at: Sequence[Any], buffers: Mapping[str, Array]) -> Any:
    kind, *rest = value
    if kind == "number":
        return rest[0]
    if kind == "at":
        return at[rest[0]]
    if kind == "load":
        return buffers[rest[0]][tuple(_compute(index, at, buffers) for index in rest[1])]
    if kind == "cast":
        return np.asarray(_compute(rest[1], at, buffers)).astype(numpy_dtype(rest[0]))
    if kind == "select":
        return np.where(*(_compute(each, at, buffers) for each in rest))
    return _OPERATORS[kind](*(_compute(each, at, buffers) for each in rest))


def work(program: str, shapes: Sequence[Sequence[int]], dtypes: Sequence[str], inputs: int) -> tuple[int, int]:
    """Bytes and operations that no implementation can do without: results whole, of each argument no more than there
    are points, and an operation a point."""
    points = [prod(block["extents"]) for block in json.loads(program)["blocks"]]
    most = max(points)
    sizes = [prod(shape) if i >= inputs else min(prod(shape), most) for i, shape in enumerate(shapes)]
    return sum(n * numpy_dtype(d).itemsize for n, d in zip(sizes, dtypes, strict=True)), sum(points)
