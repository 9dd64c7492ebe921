"""Plain operators of a CPU: no schedule of ours takes them, so MetaSchedule's traces are their tiles.

The tuner measures traces as it does tiles (tuner/metaschedule.py proposes them) and keeps records of them; a compile
applies the fastest to the operator of the same structural hash.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from typing import Any

from tilewright.compiler.codegen.plain_operators import Operator, apply_trace, structural_hash
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Schedule
from tilewright.schedules.records import Known, Record, fastest, space_hash

logger = logging.getLogger(__name__)

NAME = "generic"
MOST_TRACES = 32  # that are measured of one operator: it is a small part of a step, and so is its space


@cache
def rules() -> str:
    """What makes traces, and applies them."""
    return f"metaschedule of apache-tvm {metadata.version('apache-tvm')}"


@dataclass(frozen=True)
class Trace:
    """A schedule of an operator. instructions: as JSON, "" for what TVM does by itself. rules: as `rules` says."""

    rules: str
    instructions: str = ""

    def __post_init__(self) -> None:
        if self.instructions and not isinstance(json.loads(self.instructions), list):
            raise ValueError("a trace is a list of instructions and one of decisions")

    def __str__(self) -> str:
        return f"a trace of {self.length} instructions" if self.instructions else "TVM's default"

    @property
    def length(self) -> int:
        """How many instructions there are."""
        return len(json.loads(self.instructions)[0]) if self.instructions else 0


@dataclass(frozen=True)
class OperatorFacts:
    """operator: names of what is computed. arguments: of the PrimFunc, results last, as dtype[extents]. code: its
    structural hash."""

    operator: str
    arguments: str
    code: str


@dataclass(frozen=True)
class OperatorSpec:
    """An operator as a problem to be measured. reference: what it computes, as tuner/loops.py runs it. size_bytes,
    operations: of one row, that no implementation can do without."""

    facts: OperatorFacts
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    inputs: int
    reference: str
    size_bytes: int
    operations: int


@dataclass(frozen=True)
class Generic(Schedule):
    """One operator. code: its PrimFunc, as TVM writes it to a file."""

    spec: OperatorSpec
    code: str = field(repr=False)

    name = NAME
    composite = NAME
    kind = "cpu"
    most_tiles = MOST_TRACES

    def match(self, call: Call, target: Target) -> OperatorFacts:
        return self.spec.facts

    def space(self, facts: OperatorFacts, target: Target) -> Sequence[Trace]:
        return no_traces()

    def tile_of(self, fields: Mapping[str, Any]) -> Trace:
        return Trace(**fields)

    def floor(self, facts: OperatorFacts, target: Target) -> Floor:
        return Floor(0, self.spec.size_bytes, self.spec.operations)

    def apply(self, facts: OperatorFacts, tile: Trace, target: Target) -> Lowering:
        import tvm

        func = tvm.ir.load_json(self.code)
        if tile.instructions:
            func = apply_trace(func, tile.instructions)
        spec = self.spec
        described = zip(spec.shapes[spec.inputs :], spec.dtypes[spec.inputs :], strict=True)
        outputs = tuple(Output(f"y{i}", shape, dtype) for i, (shape, dtype) in enumerate(described))
        call = KernelCall(func.with_attr("tw.plain", True), tuple(range(spec.inputs)), outputs)
        return Lowering((call,), tuple(output.name for output in outputs))


def no_traces() -> tuple[Trace, ...]:
    """What is known of an operator's space beforehand: the default."""
    return (Trace(rules()),)


def facts_of(operator: Operator) -> OperatorFacts:
    arguments = ", ".join(
        f"{dtype}[{','.join(map(str, shape))}]" for shape, dtype in zip(operator.shapes, operator.dtypes, strict=True)
    )
    return OperatorFacts(re.sub(r"\d+(?=_|$)", "", operator.name), arguments, structural_hash(operator.func))


@dataclass
class Tuned:
    """Which operators of a program run by a trace. taken: their records, as they are found."""

    known: Known
    taken: dict[str, tuple[Operator, Trace, Record]] = field(default_factory=dict)

    def __call__(self, found: Sequence[Operator]) -> Mapping[str, Any]:
        """Other PrimFuncs for operators that records have a trace of, by name. Records that don't fit are warned of."""
        facts = {operator.name: facts_of(operator) for operator in found}
        self._tell_stale(facts.values())
        chosen = {}
        for operator in found:
            func = self._traced(operator, facts[operator.name])
            if func is not None:
                chosen[operator.name] = func
        return chosen

    def _traced(self, operator: Operator, facts: OperatorFacts) -> Any:
        """The operator after its fastest trace; None where that is the default, or there is none that fits."""
        mine = [r for code, r in self._records if code == facts.code and r.us is not None]
        current = [r for r in mine if r.space == space_hash(no_traces())]
        if not current:
            return None
        record = fastest(current, operator.rows)
        fields = json.loads(record.tile)
        try:
            trace = Trace(**{name: value for name, value in fields.items() if name != "is"})
            if not trace.instructions:
                return None
            func = apply_trace(operator.func, trace.instructions)
        except Exception as error:  # whatever TVM finds wrong with it
            reason = " ".join(str(error).split())[:120]
            logger.warning("tuning record %s does not fit %s: not used (%s)", record.place, facts.operator, reason)
            return None
        self.taken[operator.name] = operator, trace, record
        return func

    @cached_property
    def _records(self) -> Sequence[tuple[str, Record]]:
        """Those of operators, with the hash of what they compute."""
        return [(json.loads(r.facts).get("code", ""), r) for r in self.known.records if r.schedule == NAME]

    def _tell_stale(self, facts: Any) -> None:
        current = space_hash(no_traces())
        codes = {each.code: each for each in facts}
        alike = {(each.operator, each.arguments) for each in codes.values()}
        for code, record in self._records:
            theirs, known = json.loads(record.facts), code in codes
            other = not known and (theirs.get("operator"), theirs.get("arguments")) in alike
            if other or (known and record.space != current):
                what = "another computation" if other else "traces of another TVM"
                logger.warning(
                    "tuning record %s is of %s than today's %s: not used; tilewright tune measures anew",
                    record.place,
                    what,
                    theirs["operator"],
                )

    def described(self) -> list[dict[str, Any]]:
        """The operators that run by a trace, as a manifest lists kernels."""
        return [
            {
                "name": name,
                "schedule": NAME,
                "composite": NAME,
                "rows": None if operator.symbol else operator.rows,
                "max_rows": operator.rows,
                "tile": {"instructions": trace.length},
                "floor": None,
                "record": record.place,
                "calls": dict(operator.calls),
            }
            for name, (operator, trace, record) in sorted(self.taken.items())
        ]
