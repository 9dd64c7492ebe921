"""Searches of one linear side by side, live: our tiles by the cost model, at random, and MetaSchedule on plain loops.

MetaSchedule has nothing of our kernels. Its input is the composite's reference body as one function of loops: weights
unpacked to float32, norm or gate, product, residual. It is compiled and timed as our candidates are, on the same
arguments, and held to the same reference in numpy; to our kernels' bits, which round activations, it is not.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from results_file import Results

from tilewright import tuning
from tilewright.compiler import env
from tilewright.compiler.calls import Call
from tilewright.compiler.codegen.plain_operators import bare, structural_hash
from tilewright.compiler.composites import LinearSpec
from tilewright.schedules.generic import NAME, Generic, OperatorFacts, OperatorSpec
from tilewright.schedules.records import Record, text_of
from tilewright.tuner.candidates import Candidate, Compilers, Failure
from tilewright.tuner.measuring import Measurer, Timing
from tilewright.tuner.metaschedule import OperatorSearch
from tilewright.tuner.outcomes import Provenance, finished, now
from tilewright.tuner.problems import Problem
from tilewright.tuner.search import ModelSearch, RandomSearch, Search
from tilewright.tuner.sweep import BATCH, template
from tilewright.tuner.tasks import Task

COMPILE_LIMIT_S = 30.0  # a trace may unroll into what LLVM takes minutes for


@dataclass(frozen=True)
class Point:
    """Seconds from the start and candidates so far, when one was measured; its microseconds, None where it failed."""

    seconds: float
    trials: int
    us: float | None


@dataclass(frozen=True)
class Runner:
    """What compiles and measures. problem: what all candidates compute. budget_s, most: of one search, whichever ends
    first."""

    problem: Problem
    compilers: Compilers
    measurer: Measurer
    by: Provenance
    budget_s: float
    most: int

    def run(self, task: Task, search: Search) -> list[Point]:
        """A search from nothing, batch by batch."""
        start_s = time.monotonic()
        points: list[Point] = []
        measured: dict[str, Record] = {}
        default: Candidate | None = None
        # MetaSchedule does not time what it starts from, either: plain loops may take seconds.
        passed = {task.default_text} if isinstance(task.schedule, Generic) else set()
        while time.monotonic() - start_s < self.budget_s and len(points) < self.most:
            tiles = search.propose(task, measured, passed | set(measured), BATCH)
            if not tiles:
                break
            futures = [self.compilers.submit(task.schedule, task.facts, tile, task.target) for tile in tiles]
            for tile, future in zip(tiles, futures, strict=True):
                compiled = future.result()
                if default is None and isinstance(compiled, Candidate):
                    default = compiled
                outcome = self._timed(task, default, compiled, len(points))
                points.append(Point(time.monotonic() - start_s, len(points) + 1, getattr(outcome, "us", None)))
                blank = replace(template(task, self.by), trial=len(points))
                record = measured[text_of(tile)] = finished(blank, text_of(tile), outcome, None, now())
                search.learn(record)
                if time.monotonic() - start_s >= self.budget_s:
                    break
        return points

    def _timed(self, task: Task, default: Any, compiled: Candidate | Failure, count: int) -> Timing | Failure:
        if isinstance(compiled, Failure):
            return compiled
        if isinstance(task.schedule, Generic):
            # Bits are its own. Another context makes it another problem to the measurer, which compares it with numpy.
            return self.measurer.measure(replace(self.problem, context=count + 1), compiled, compiled)
        return self.measurer.measure(self.problem, default, compiled)


def race(tasks: Sequence[Task], budget_s: float, most: int, close: float, out: Results) -> None:
    """Three lines a task: seconds and trials until a candidate is within `close` of the best of all three."""
    compilers = Compilers(env.jobs(), COMPILE_LIMIT_S)
    try:
        with tuning.measurer("cpu") as measurer:
            for task in tasks:
                runner = Runner(task.problem, compilers, measurer, tuning.provenance("cpu"), budget_s, most)
                report(task, searches(task, runner), close, out)
    finally:
        compilers.close()


def searches(task: Task, runner: Runner) -> Mapping[str, list[Point]]:
    plain, traces = plain_task(task), OperatorSearch(RandomSearch())
    try:
        return {
            "tilewright": runner.run(task, ModelSearch()),
            "random": runner.run(task, RandomSearch()),
            "metaschedule": runner.run(plain, traces),
        }
    finally:
        traces.close()


def report(task: Task, found: Mapping[str, list[Point]], close: float, out: Results) -> None:
    best = {name: min((p.us for p in points if p.us), default=None) for name, points in found.items()}
    known_us = min(us for us in best.values() if us)
    for name, points in found.items():
        hit = next((p for p in points if p.us and p.us <= known_us / close), None)
        end = hit or (points[-1] if points else Point(0.0, 0, None))
        reached = round(known_us / best[name], 4) if best[name] else 0.0
        facts = {
            "task": task.name,
            "within": hit is not None,
            "trials": end.trials,
            "reached": reached,
            "best_us": best[name],
            "best_known_us": known_us,
            "tried": len(points),
            "failed": sum(point.us is None for point in points),
        }
        out.add("race", name, [end.seconds], **facts)


def plain_task(task: Task) -> Task:
    """The task's computation as loops that no schedule of ours has touched."""
    import tvm

    func, shapes, dtypes = plain_function(task.call.spec, task.rows)
    facts = OperatorFacts(f"plain {task.name}", "", structural_hash(func))
    spec = OperatorSpec(facts, shapes, dtypes, len(shapes) - 1, "", 1, 1)
    call = Call(NAME, spec, task.rows, task.rows)
    return Task(Generic(spec, tvm.ir.save_json(func)), facts, call, task.target, why_not="is no operator of a step")


def plain_function(spec: LinearSpec, rows: int) -> tuple[Any, tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """The reference body of a linear of so many rows as one PrimFunc; its parameters' shapes and dtypes, the result
    last."""
    import tvm
    from tvm import relax

    from tilewright.compiler.served_bodies import add_served_composite

    builder = relax.BlockBuilder()
    gvar = add_served_composite(builder, "linear", spec)
    composite = builder.get()[gvar]
    types = [
        relax.TensorType([getattr(n, "value", rows) for n in p.ty.shape.values], p.ty.dtype) for p in composite.params
    ]
    params = [relax.Var(f"a{i}", ty) for i, ty in enumerate(types)]
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(relax.Call(gvar, params))
        builder.emit_func_output(result)
    mod = relax.transform.LegalizeOps()(builder.get())
    mod = tvm.IRModule({g: f.with_attr("Primitive", True) if g == gvar else f for g, f in mod.functions.items()})
    mod = relax.transform.FuseTIR()(relax.transform.BindSymbolicVars({"n": rows})(mod))
    called = mod["main"].body.blocks[0].bindings[0].value.args[0]
    sizes = [*types, result.ty]
    shapes = tuple(tuple(int(n) for n in ty.shape.values) for ty in sizes)
    return bare(mod[called]), shapes, tuple(str(ty.dtype) for ty in sizes)


def of_few_rows(tasks: Sequence[Task], most: int) -> list[Task]:
    """The block linears of a plan that plain loops can be timed on within seconds, with the most of its time first."""
    return [t for t in tasks if t.schedule.name.startswith("linear_block") and t.rows <= 16][:most]
