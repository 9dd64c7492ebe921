"""What `tune` does: a model's tasks, a sweep over them on this machine, and bundles for another one."""

import platform
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright import __version__
from tilewright.compiler import env, targets
from tilewright.compiler.errors import TargetError, UserError
from tilewright.compiler.options import Options
from tilewright.compiler.progress import Progress as CompileProgress
from tilewright.compiler.targets import cuda
from tilewright.compiler.targets.base import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilewright.schedules.records import Record
    from tilewright.tuner.measuring import Measurer
    from tilewright.tuner.outcomes import Provenance
    from tilewright.tuner.sweep import Budget, State
    from tilewright.tuner.tasks import Task

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Plan:
    """What there is to tune: tasks with the most of the workload's time first. skipped: tasks that can't be measured,
    have one tile alone, or are not in the workload."""

    target: Target
    tasks: "tuple[Task, ...]"
    skipped: "tuple[Task, ...]"


def plan(model: str, options: Options, workload: str, report: Callable[[CompileProgress], None]) -> Plan:
    """The tasks of a model, compiled as far as there are no kernels in it yet. Raises UserError."""
    from tilewright.compiler.without_torch import without_torch

    with without_torch():
        import tvm  # noqa: F401  first here, so that no later import brings torch along
    from tilewright.compiler.build import lower, read_checkpoint, weight_formats
    from tilewright.tuner.operators import extract_operators
    from tilewright.tuner.tasks import extract
    from tilewright.tuner.workloads import named

    steps = named(workload, options.max_batch, options.max_tokens)
    checkpoint = read_checkpoint(model, options, report)
    module = lower(checkpoint, weight_formats(checkpoint, options), options, report, choose=_leave)
    found = [*extract(module, options.target, steps), *extract_operators(module, options.target, steps)]
    found.sort(key=lambda task: (-task.load_us, task.key))
    tasks = tuple(task for task in found if task.load_us and not task.why_not and task.size > 1)
    return Plan(options.target, tasks, tuple(task for task in found if task not in tasks))


def _leave(call: Any) -> None:
    """In the place of a Chooser: every composite stays a call of its body."""


def parse_budget(text: str) -> float:
    """Seconds of "20m", "90s", "1.5h". Raises UserError."""
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS_S else (text, "s")
    try:
        seconds = float(number) * _UNITS_S[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise UserError(f"--budget is {text!r}; give a time above 0 such as 90s, 20m or 2h")
    return seconds


def check_measurable(target: Target) -> None:
    """Raises TargetError where this machine can't run what is compiled for the target."""
    obstacle = targets.run_obstacle(target)
    if obstacle:
        reason = obstacle.partition(";")[0]
        raise TargetError(
            f"tuning for {target.name} measures on it, and {reason}; run this there, or make a bundle with --export"
        )


def provenance(kind: str, compiled: bool = True) -> "Provenance":
    """This machine, as records name it. compiled: whether kernels are compiled here too."""
    from tilewright.tuner.outcomes import Provenance

    device = targets.device_name(kind)
    assert device is not None, "asked for a device that is not here"
    return Provenance(device, _driver(kind), versions(kind) if compiled else "")


def versions(kind: str) -> str:
    """What compiles kernels here, as a record holds it."""
    from tilewright.schedules.records import canonical

    found = {"tilewright": __version__} | {n: metadata.version(n) for n in ("apache-tvm", "apache-tvm-ffi")}
    if kind == "cuda":
        from tilewright.compiler.codegen.cuda_toolchain import find_toolchain

        found["nvrtc"] = find_toolchain().version
    return canonical(found)


def _driver(kind: str) -> str:
    if kind == "cpu":
        return f"{platform.system()} {platform.release()}"
    from tilewright.tuner.device_cuda import open_sensors

    sensors, driver = open_sensors(), cuda.find_driver()
    release = f"{sensors.driver()}, " if sensors else ""
    return f"{release}CUDA {'.'.join(map(str, driver.version))}" if driver else ""


@contextmanager
def measurer(kind: str) -> "Iterator[Measurer]":
    """The process that measures; on a CPU with every thread on a core of its own."""
    from tilewright.tuner.measuring import Measurer

    pinned = {"TVM_NUM_THREADS": str(env.threads()), "TVM_BIND_THREADS": "1"}
    made = Measurer(kind, pinned if kind == "cpu" else {})
    try:
        yield made
    finally:
        made.close()


def sweep(
    found: Plan, logs: Path, budget: "Budget", until: float, observe: "Callable[[State], None]"
) -> "tuple[State, list[str]]":
    """Tunes the tasks and leaves records in `logs`. Returns where it ended, and what is wrong with lines of the log
    that are no records. Raises UserError: of the machine, or the log folder."""
    from tilewright.tuner.candidates import Compilers
    from tilewright.tuner.log import Log, locked
    from tilewright.tuner.metaschedule import OperatorSearch
    from tilewright.tuner.search import ModelSearch
    from tilewright.tuner.sweep import Sweep

    kind = found.target.kind
    check_measurable(found.target)
    by = provenance(kind)
    with locked(logs):
        log = Log(logs, by.device)
        compilers = Compilers(env.jobs())
        search = OperatorSearch(ModelSearch([*log.records, *other_devices(logs, by.device)]))
        try:
            with measurer(kind) as measuring:
                run = Sweep(found.tasks, log, compilers, measuring, search, by, budget, until, kind == "cuda", observe)
                return run.run(), log.problems
        finally:
            compilers.close()
            search.close()


def other_devices(logs: Path, device: str) -> "list[Record]":
    """The records of all devices but one."""
    from tilewright.compiler.targets.measured import slug
    from tilewright.schedules.records import read_file

    files = [file for file in sorted(logs.glob("*/*.jsonl")) if file.parent.name != slug(device)]
    return [record for file in files for record in read_file(file)[0]]


def records_of(found: Plan, logs: Path) -> "tuple[Sequence[Record], list[str]]":
    """The records that a compile for the plan's target goes by here."""
    from tilewright.schedules.records import read_known

    target = found.target
    device = None if targets.run_obstacle(target) else targets.device_name(target.kind)
    known, problems = read_known(logs, target, device)
    return known.records, problems


def export(
    found: Plan, file: Path, logs: Path, trials: int | None, done: Callable[[int, int], None]
) -> tuple[int, int]:
    """A bundle of the tasks' candidates, compiled here. Returns how many it has and how many did not compile. Plain
    operators are left out: their traces are found where they are measured."""
    from tilewright.tuner.candidates import Compilers
    from tilewright.tuner.export import export as make_bundle
    from tilewright.tuner.search import ModelSearch

    compilers = Compilers(env.jobs())
    search = ModelSearch(other_devices(logs, ""))
    try:
        made_by = versions(found.target.kind)
        tasks = [task for task in found.tasks if task.schedule.most_tiles is None]
        return make_bundle(file, found.target, tasks, search, compilers, made_by, trials, done)
    finally:
        compilers.close()


def measure(file: Path, done: "Callable[[Record, int, int], None]") -> tuple[Path, int]:
    """Measures a bundle. Returns the file of records beside it, and how many there are."""
    from tilewright.tuner import bundle

    output = file.with_suffix(".jsonl")
    with bundle.opened(file) as (kind, tasks), measurer(kind) as measuring:
        total, count = sum(len(task.tiles) for task in tasks), 0

        def one(record: "Record") -> None:
            nonlocal count
            count += 1
            done(record, count, total)

        return output, bundle.measure(tasks, measuring, provenance(kind, compiled=False), output, one)


def present(found: Plan, records: "Sequence[Record]") -> "dict[Any, float]":
    from tilewright.tuner.sweep import present_us

    return dict(present_us(found.tasks, records))
