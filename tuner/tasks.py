"""What there is to tune in a model: one task for each schedule, facts and number of rows, weighted by a workload."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tilewright.compiler.calls import Call, bounds_of, call_of, rows_extents
from tilewright.compiler.relax_utils import bindings, composite_of
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Reject, Schedule
from tilewright.schedules.order import ORDER, parts_of
from tilewright.schedules.records import space_hash, text_of
from tilewright.tuner.problems import Problem, problem_of
from tilewright.tuner.workloads import CONTEXT, Step

_STEP, _DECODE_ANY = "step", "step_decode"  # functions of a served module; step_N decodes N sequences
# What is known of a machine that nobody has measured: enough to weigh tasks against each other.
_USUAL_GBS, _USUAL_TOPS = {"cpu": 20.0, "cuda": 1000.0}, {"cpu": 0.5, "cuda": 300.0}


Key = tuple[str, str, int]  # schedule, facts as text, rows


@dataclass(frozen=True)
class Task:
    """A choice of tile that a compile makes. call: with as many rows as it is made for. calls: how often a workload's
    average step makes it, load_us: the floor of these calls, with as many rows as the workload's steps have. why_not:
    why it can't be measured, "" where it can."""

    schedule: Schedule
    facts: Any
    call: Call
    target: Target
    calls: float = 0.0
    load_us: float = 0.0
    why_not: str = ""

    @property
    def rows(self) -> int:
        return self.call.rows

    @property
    def key(self) -> Key:
        return self.schedule.name, self.facts_text, self.rows

    @cached_property
    def facts_text(self) -> str:
        return text_of(self.facts)

    @cached_property
    def space(self) -> tuple[Any, ...]:
        return tuple(self.schedule.space(self.facts, self.target))

    @cached_property
    def space_hash(self) -> str:
        return space_hash(self.space)

    @cached_property
    def size(self) -> int:
        """How many tiles are tried at most."""
        return self.schedule.most_tiles or len(self.space)

    def tile_of(self, text: str) -> Any:
        """The tile of a text that a record of today's space has."""
        found = next((tile for tile in self.space if text_of(tile) == text), None)
        if found is not None or self.schedule.most_tiles is None:
            return found
        return self.schedule.tile_of({name: value for name, value in json.loads(text).items() if name != "is"})

    @cached_property
    def default_text(self) -> str:
        """The tile that is taken where nothing is known."""
        return text_of(self.space[0])

    @cached_property
    def problem(self) -> Problem:
        """Of a task without `why_not`."""
        problem = problem_of(self.call, CONTEXT)
        assert isinstance(problem, Problem), problem
        return problem

    def work(self, rows: int) -> tuple[int, int]:
        """The bytes and operations of a call of so many rows that no implementation can do without."""
        floor = self.schedule.floor(self.facts, self.target)
        more = (0, 0) if self.why_not else (self.problem.more_bytes, self.problem.more_operations)
        size = floor.bytes_fixed + rows * floor.bytes_per_row + more[0] * rows // self.rows
        return size, rows * floor.flops_per_row + more[1] * rows // self.rows

    def least_us(self, rows: int) -> float:
        """The least time of a call by the target's ceilings, or by usual ones where it has none."""
        size, operations = self.work(rows)
        gbs = self.target.bandwidth_gbs or _USUAL_GBS[self.target.kind]
        tops = self.target.matrix_tops or _USUAL_TOPS[self.target.kind]
        return max(size / (gbs * 1e3), operations / (tops * 1e6))

    @cached_property
    def floor_us(self) -> float:
        return self.least_us(self.rows)

    @property
    def name(self) -> str:
        """For people: schedule, the facts that tell it from its neighbours, rows."""
        return f"{self.schedule.name} {_words(self.call.spec)} m={self.rows}"


def _words(spec: Any) -> str:
    """The extents of a spec, and what is fused."""
    if hasattr(spec, "reference"):
        return f"{spec.facts.operator} {spec.dtypes[-1]}[{'x'.join(map(str, spec.shapes[-1]))}]"
    if hasattr(spec, "out_features"):
        fused = [n for n in ("norm", "gated", "gate", "bias", "residual") if getattr(spec, n)]
        bits = f" a{spec.activation_bits}" if spec.dtype == "float32" else ""
        return " ".join([f"{spec.out_features}x{spec.in_features} {spec.weight_format}{bits}", *fused])
    if hasattr(spec, "attention"):
        a = spec.attention
        return f"{a.heads}/{a.kv_heads}x{a.head_dim}" + (f" window={a.window}" if a.window else "")
    names = ("vocab", "heads", "features", "head_dim")
    return "x".join(str(getattr(spec, n)) for n in names if getattr(spec, n, None)) or "pages"


def extract(mod: Any, target: Target, workload: Sequence[Step], order: Sequence[Schedule] = ORDER) -> list[Task]:
    """The tasks of a module whose composites have not been lowered ("scheduled" without kernels), those with the most
    of the workload's time first. Calls of equal facts and rows are one task, whichever function makes them."""
    found: dict[Key, Task] = {}
    steps = steps_of(mod)
    share = sum(step.share for step in workload)
    for name, func in steps.items():
        run = [step for step in workload if function_of(step, steps) == name]
        for call, symbol in _composite_calls(mod, func):
            parts = _parts(call, target, order)
            for part in parts:
                found.setdefault(part.key, part)
            for step in run if parts else ():
                rows = call.m or (step.sequences if symbol == "r" else step.tokens)
                chosen = next((part for part in parts if rows <= part.rows), parts[-1])
                task, times = found[chosen.key], step.share / share
                load_us = task.load_us + times * task.least_us(rows)
                found[chosen.key] = replace(task, calls=task.calls + times, load_us=load_us)
    return sorted(found.values(), key=lambda task: (-task.load_us, task.key))


def steps_of(mod: Any) -> Mapping[str, Any]:
    """The functions that run an engine's steps, by name."""
    names = {g.name_hint: f for g, f in mod.functions.items()}
    return {name: func for name, func in names.items() if name == _STEP or name.startswith(f"{_STEP}_")}


def _composite_calls(mod: Any, func: Any) -> list[tuple[Call, str]]:
    """The calls of a function, and the symbol of their rows: "t" tokens, "r" wanted rows; "" where it is static."""
    decode = bool((func.attrs or {}).get("tw.decode", False))
    found = []
    for binding in bindings(func):
        if composite_of(mod, binding.value) is not None:
            rows = rows_extents(mod, binding.value)[0]
            found.append((call_of(mod, binding.value, bounds_of(func), decode), getattr(rows, "name", "")))
    return found


def _parts(call: Call, target: Target, order: Sequence[Schedule]) -> list[Task]:
    """A task for each number of rows that the call's schedule tells apart; none where no schedule takes it."""
    for schedule in order:
        fits = schedule.composite == call.composite and schedule.kind == target.kind
        if fits and not isinstance(schedule.match(call, target), Reject):
            return [_task(schedule, part, target) for part in parts_of(schedule, call, target)]
    return []


def _task(schedule: Schedule, call: Call, target: Target) -> Task:
    problem = problem_of(call, CONTEXT)
    why_not = "" if isinstance(problem, Problem) else problem
    return Task(schedule, schedule.match(call, target), call, target, why_not=why_not)


def function_of(step: Step, names: Collection[str]) -> str:
    """The function that an engine runs a step by: the smallest that fits."""
    if step.decode and f"{_STEP}_{step.sequences}" in names:
        return f"{_STEP}_{step.sequences}"
    return _DECODE_ANY if step.decode and _DECODE_ANY in names else _STEP


def weights(tasks: Sequence[Task], times_us: Mapping[Key, float]) -> dict[Key, float]:
    """Each task's share of the workload's time, by times that are known or else the floor."""
    spent = {task.key: task.load_us * times_us.get(task.key, task.floor_us) / task.floor_us for task in tasks}
    total = sum(spent.values()) or 1.0
    return {key: value / total for key, value in spent.items()}
