"""MetaSchedule proposes traces of plain operators, from a process that may hang or abort without harm.

Its rules make a design space of an operator's loops, its evolutionary search with an XGBoost model mutates what was
fastest (Shao et al. 2022). It sees the operator with static extents, which its rules need; what it proposes is
compiled, checked and timed as any other candidate is, on the operator as it stands in the step.
"""

import json
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.compiler import env
from tilewright.compiler.targets.base import Target
from tilewright.schedules.generic import Generic, Trace, rules
from tilewright.schedules.records import Record
from tilewright.tuner.process import Ended, Hung, Worker, serve
from tilewright.tuner.search import Search
from tilewright.tuner.tasks import Key, Task

LIMIT_S = 60.0  # for a batch of proposals
_POPULATION, _GENERATIONS = 128, 3
_WARM = 16  # measured traces from which on the cost model's word counts
_MOST_TRIALS = 1 << 12


@dataclass(frozen=True)
class Request:
    """code, shapes: of the operator. measured: instructions with their microseconds, None for a failure. count: how
    many others are asked for."""

    code: str
    shapes: tuple[tuple[int, ...], ...]
    target: Target
    threads: int
    measured: tuple[tuple[str, float | None], ...]
    count: int


class OperatorSearch:
    """`tiles` searches what has tiles of ours, MetaSchedule plain operators: the default first, then its traces."""

    def __init__(self, tiles: Search, limit_s: float = LIMIT_S) -> None:
        self._tiles = tiles
        self._limit_s = limit_s
        self._worker = Worker(__name__)
        self._ended: set[Key] = set()  # tasks of which nothing more comes

    def learn(self, record: Record) -> None:
        self._tiles.learn(record)

    def propose(self, task: Task, measured: Mapping[str, Record], taken: Collection[str], count: int) -> list[Any]:
        schedule = task.schedule
        if not isinstance(schedule, Generic):
            return self._tiles.propose(task, measured, taken, count)
        if task.default_text not in taken:
            return [task.space[0]]
        if task.key in self._ended:
            return []
        known = [(json.loads(text)["instructions"], record.us) for text, record in measured.items()]
        told = tuple((instructions, us) for instructions, us in known if instructions)
        request = Request(schedule.code, schedule.spec.shapes, task.target, env.threads(), told, count)
        try:
            found = self._worker.ask(request, self._limit_s)
        except (Hung, Ended):
            found = []
        if not found:
            self._ended.add(task.key)
        taken_instructions = {json.loads(text)["instructions"] for text in taken}
        return [Trace(rules(), text) for text in found if text not in taken_instructions]

    def close(self) -> None:
        self._worker.close()


def main() -> None:
    from tilewright.compiler.without_torch import without_torch

    with without_torch():
        import tvm  # noqa: F401  first here, so that no later import brings torch along
    # A search imports all tensor intrinsics that TVM has, which takes up to a minute; no rule for a CPU's plain
    # operators knows any.
    sys.modules["tvm.s_tir.tensor_intrin"] = types.ModuleType("tvm.s_tir.tensor_intrin")
    evolution: list[Evolution] = []  # of the last operator

    def answer(request: Request) -> list[str]:
        if not evolution or evolution[0].code != request.code:
            evolution[:] = [Evolution(request)]
        return evolution[0].propose(request.measured, request.count)

    serve(answer)


class Evolution:
    """One operator's search. Only in the process that may be ended."""

    def __init__(self, request: Request) -> None:
        import tvm
        from tvm.s_tir import meta_schedule as ms

        from tilewright.compiler.codegen.plain_operators import alone, fixed

        self.code = request.code
        self._func = fixed(tvm.ir.load_json(request.code), request.shapes)
        self._module = alone(self._func)
        self._target = machine(request.target, request.threads)
        self._database = ms.database.MemoryDatabase()
        self._model = cost_model(request.threads)
        self._waiting: dict[str, Any] = {}  # candidates by instructions, whose results are not known yet
        self._told: set[str] = set()
        self._context = ms.TuneContext(
            self._module,
            target=self._target,
            space_generator=ms.space_generator.PostOrderApply(
                sch_rules=ms.schedule_rule.ScheduleRule.create("llvm"),
                postprocs=ms.postproc.Postproc.create("llvm"),
                mutator_probs=ms.mutator.Mutator.create("llvm"),
            ),
            search_strategy=ms.search_strategy.EvolutionarySearch(
                population_size=_POPULATION, genetic_num_iters=_GENERATIONS
            ),
            rand_state=1,
            num_threads=request.threads,
        )
        self._workload = self._database.commit_workload(self._module)
        self._earlier(request.measured)
        self._context.pre_tuning(
            max_trials=_MOST_TRIALS,
            num_trials_per_iter=request.count,
            design_spaces=self._context.generate_design_space(),
            database=self._database,
            cost_model=self._model,
        )

    def propose(self, measured: Sequence[tuple[str, float | None]], count: int) -> list[str]:
        """Instructions that were not proposed before."""
        self._learn(dict(measured))
        candidates = self._context.generate_measure_candidates() or []
        self._waiting = {instructions_of(candidate.sch.trace): candidate for candidate in candidates}
        return list(self._waiting)[:count]

    def _learn(self, us: Mapping[str, float | None]) -> None:
        """The last proposals' times; of what was not measured it is told that it failed."""
        if not self._waiting:
            return
        candidates = list(self._waiting.values())
        results = [result(us.get(text)) for text in self._waiting]
        for text, candidate in self._waiting.items():
            self._keep(text, candidate.sch.trace, us.get(text))
        self._model.update(self._context, candidates, results)
        self._context.notify_runner_results(candidates, results)
        self._waiting = {}

    def _earlier(self, measured: Sequence[tuple[str, float | None]]) -> None:
        """What other processes measured, as far as it still applies to the operator with static extents."""
        import tvm
        from tvm import s_tir

        from tilewright.compiler.codegen.plain_operators import alone

        for text, us in measured:
            schedule = s_tir.Schedule(alone(self._func))
            try:
                s_tir.schedule.Trace.apply_json_to_schedule(json.loads(text), schedule)
            except (tvm.error.InternalError, s_tir.schedule.ScheduleError):
                continue
            self._keep(text, schedule.trace, us)

    def _keep(self, text: str, trace: Any, us: float | None) -> None:
        from tvm.s_tir import meta_schedule as ms

        if us is None or text in self._told:
            return
        self._told.add(text)
        arguments = ms.arg_info.ArgInfo.from_entry_func(self._module, remove_preproc=True)
        record = ms.database.TuningRecord(trace, self._workload, [us * 1e-6], self._target, arguments)
        self._database.commit_tuning_record(record)


def machine(target: Target, threads: int) -> Any:
    """TVM's target, which says how many cores there are, as MetaSchedule's rules ask."""
    import tvm

    options: dict[str, Any] = {"kind": "llvm", "num-cores": threads}
    if target.mcpu:
        options["mcpu"] = target.mcpu
    if target.mattr:
        options["mattr"] = list(target.mattr)
    return tvm.target.Target(options)


def cost_model(threads: int) -> Any:
    """MetaSchedule's XGBoost model, which is told the number of threads so that it asks nobody else."""
    from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBConfig, XGBModel

    return XGBModel(config=XGBConfig(nthread=threads), num_warmup_samples=_WARM)


def result(us: float | None) -> Any:
    """A measured time as MetaSchedule takes it."""
    from tvm.s_tir.meta_schedule.runner import RunnerResult

    return RunnerResult([us * 1e-6], None) if us is not None else RunnerResult(None, "failed")


def instructions_of(trace: Any) -> str:
    """A trace as JSON of plain values."""
    return json.dumps(_plain(trace.as_json()))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "value"):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value]
