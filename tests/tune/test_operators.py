"""Plain operators as tasks: what they compute, how MetaSchedule's traces are measured, and which a compile applies."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, s_tir, tirx
from tvm.script import tirx as T

from tests.kernel_runner import host_target
from tests.passes.scheduled_models import served_model
from tests.tune.sweep_planted import BY
from tests.tune.test_tasks import DECODE_ONE, MODEL, PROMPT
from tilewright.compiler.codegen.llvm_target import llvm_target
from tilewright.compiler.codegen.plain_operators import Operator, alone, bare, fuse, operators
from tilewright.compiler.codegen.program import build_program
from tilewright.compiler.targets import RECORDS
from tilewright.passes.plan_buckets import PlanBuckets
from tilewright.schedules.generic import Trace, Tuned, facts_of, rules
from tilewright.schedules.records import Known, Record, read_file, text_of
from tilewright.tuner import loops
from tilewright.tuner.candidates import Candidate, Compilers, Failure
from tilewright.tuner.log import Log, merge
from tilewright.tuner.measuring import Measurer, Timing
from tilewright.tuner.metaschedule import OperatorSearch, instructions_of
from tilewright.tuner.operators import extract_operators, operator_task
from tilewright.tuner.search import RandomSearch
from tilewright.tuner.sweep import Budget, State, Sweep
from tilewright.tuner.tasks import Task


@T.prim_func(private=True, s_tir=True)
def cosines(x_handle: T.handle, y_handle: T.handle):
    t = T.int64()
    x = T.match_buffer(x_handle, (t, T.int64(24)), "float32")
    y = T.match_buffer(y_handle, (t, T.int64(24)), "float32")
    for i, j in T.grid(t, T.int64(24)):
        with T.sblock("cos"):
            r, c = T.axis.remap("SS", [i, j])
            y[r, c] = T.cos(x[r, c])


@T.prim_func(private=True, s_tir=True)
def sums(
    x: T.Buffer((T.int64(7), T.int64(512)), "float32"),
    rows: T.Buffer((T.int64(3),), "int32"),
    y: T.Buffer((T.int64(3),), "float32"),
):
    for i, j in T.grid(T.int64(3), T.int64(512)):
        with T.sblock("sum"):
            r, k = T.axis.remap("SR", [i, j])
            with T.init():
                y[r] = T.float32(0)
            y[r] = y[r] + x[T.min(T.Cast("int64", rows[r]), T.int64(6)), k] * T.float32(0.5)


COSINES = Operator("tir_cos3", bare(cosines), ((64, 24), (64, 24)), ("float32",) * 2, 1, "t", {"step": 1})
SUMS = Operator("sum1", bare(sums), ((7, 512), (3,), (3,)), ("float32", "int32", "float32"), 2, "", {"step": 1})


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    made = Compilers(1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def measurer() -> Iterator[Measurer]:
    made = Measurer("cpu", {"TVM_NUM_THREADS": "1"})
    yield made
    made.close()


def task_of(operator: Operator) -> Task:
    return replace(operator_task(operator, host_target()), load_us=1.0)


def trace(change: Any, func: Any) -> Trace:
    """What `change` does to the schedule of a PrimFunc."""
    schedule = s_tir.Schedule(alone(func))
    change(schedule)
    return Trace(rules(), instructions_of(schedule.trace))


def test_the_reference_is_what_the_loops_say() -> None:
    rng = np.random.default_rng()
    x, rows = rng.standard_normal((7, 512), np.float32), np.array([6, 0, 3], np.int32)
    y = np.zeros(3, np.float32)
    loops.run(task_of(SUMS).problem.spec.reference, [x, rows, y])
    np.testing.assert_allclose(y, x[rows].sum(1) * 0.5, rtol=1e-5)
    x = rng.standard_normal((64, 24), np.float32)
    y = np.zeros_like(x)
    loops.run(task_of(COSINES).problem.spec.reference, [x, y])
    np.testing.assert_array_equal(y, np.cos(x))


def test_the_floor_counts_what_is_read_once() -> None:
    assert task_of(COSINES).work(64) == (2 * 64 * 24 * 4, 64 * 24)
    gathered = task_of(SUMS)  # three rows of seven
    assert gathered.work(3)[0] == pytest.approx(4 * (3 * 512 + 3 + 3), abs=3)
    assert gathered.name == "generic sum float32[3] m=3"


def test_the_operators_of_a_models_steps_are_tasks() -> None:
    module = PlanBuckets(decode=(1,), max_tokens=24, max_batch=3).run(served_model(MODEL))
    tasks = extract_operators(module, host_target(), [DECODE_ONE, PROMPT])
    found = {(task.facts.operator, task.rows): task for task in tasks}
    assert found["tir_cos", 24].calls == found["tir_cos", 1].calls == 0.5  # one step of each kind
    assert found["take", 3].calls and found["take", 3].load_us == pytest.approx(0.5 * found["take", 3].least_us(1))
    assert not any(task.why_not or task.facts.operator == "reshape" for task in tasks)  # a reshape moves nothing
    assert extract_operators(module, RECORDS["nvidia-h100"], [PROMPT]) == []


def run_sweep(task: Task, logs: Path, compilers: Compilers, measurer: Measurer, limit_s: float = 60.0) -> State:
    search = OperatorSearch(RandomSearch(), limit_s)
    try:
        return Sweep([task], Log(logs, BY.device), compilers, measurer, search, BY, Budget(), 1.0).run()
    finally:
        search.close()


def test_traces_are_measured_recorded_and_compiled(
    compilers: Compilers, measurer: Measurer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(COSINES)
    [progress] = run_sweep(task, tmp_path, compilers, measurer).tasks
    assert progress.done == "all tiles tried" and 2 <= len(progress.measured) <= task.size
    assert not progress.failures, [record.detail for record in progress.measured.values()]
    assert run_sweep(task, tmp_path, compilers, measurer).trials == 0  # what is there is not proposed again

    [file] = tmp_path.glob("*/generic.jsonl")
    records, _, problems = read_file(file)
    assert not problems and len(records) == len(progress.measured)
    assert merge([file], tmp_path / "other") == (len(records), len(records), [])
    fast = [replace(r, us=1.0 if json.loads(r.tile)["instructions"] else 2.0) for r in records]
    tuned = Tuned(Known(tuple(fast)))
    chosen = tuned([COSINES, SUMS])
    assert list(chosen) == ["tir_cos3"] and "vectorized" in chosen["tir_cos3"].script()
    [about] = tuned.described()
    assert about["record"].endswith("generic.jsonl:" + about["record"].rpartition(":")[2])
    assert about["tile"]["instructions"] > 3 and about["max_rows"] == 64 and about["rows"] is None
    assert list(Tuned(Known(tuple(fast)))([replace(COSINES, shapes=((40, 24), (40, 24)))])) == ["tir_cos3"]
    slow = [replace(r, us=3.0 - r.us) for r in fast]
    assert Tuned(Known(tuple(slow)))([COSINES]) == {} and not caplog.records


def step_module() -> Any:
    """A step of one operator, cos(x) + x."""
    x = relax.Var("x", relax.TensorType((tirx.Var("t", "int64"), 24), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("step", [x], attrs={"num_input": 1, "tir_var_upper_bound": {"t": 64}}):
        with builder.dataflow():
            result = builder.emit_output(relax.op.add(builder.emit(relax.op.cos(x)), x))
        builder.emit_func_output(result)
    return builder.get()


def test_a_program_runs_its_operators_by_their_traces() -> None:
    """The same bits, and the trace's loops in the place of TVM's."""
    target, module = host_target(), step_module()
    with llvm_target(target):
        [operator] = operators(fuse(module))

    def split(schedule: Any) -> None:
        *_, last = (block for block in schedule.get_child_blocks(schedule.get_sblock("root")))
        rows, columns = schedule.get_loops(last)
        schedule.parallel(rows)
        schedule.vectorize(schedule.split(columns, [None, 8])[1])

    tuned = Tuned(Known((record_of(operator, trace(split, operator.func)),)))
    x, results = np.random.default_rng().standard_normal((5, 24), np.float32), []
    for choose in (lambda found: {}, tuned):
        executable, _ = build_program(module, target, choose)
        machine = relax.VirtualMachine(executable, tvm.cpu())
        results.append(machine["step"](tvm.runtime.tensor(x), ()).numpy())
    assert list(tuned.taken) == [operator.name] and operator.calls == {"step": 1}
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], np.cos(x) + x, rtol=1e-5, atol=1e-6)


def record_of(operator: Operator, tile: Trace, code: str = "", space: str = "") -> Record:
    task = task_of(operator)
    facts = replace(task.facts, code=code or task.facts.code)
    target = "cpu cpu x86_64"
    fields = {"space": space or task.space_hash, "tile": text_of(tile), "us": 1.0, "place": "here/generic.jsonl:4"}
    return Record(BY.device, target, "generic", text_of(facts), task.rows, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"code": "0" * 16}, "is of another computation than today's tir_cos: not used; tilewright tune measures anew"),
        ({"space": "0" * 16}, "is of traces of another TVM than today's tir_cos: not used; tilewright tune measures"),
        ({}, "does not fit tir_cos: not used"),
    ],
)
def test_a_trace_that_is_not_for_the_operator_is_named(
    fields: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    def elsewhere(schedule: Any) -> None:
        """Begins as it might here."""
        schedule.parallel(schedule.get_loops(schedule.get_child_blocks(schedule.get_sblock("root"))[0])[0])
        schedule.unroll(schedule.get_loops(schedule.get_sblock("sum"))[1])

    foreign = trace(elsewhere, bare(sums))
    before = facts_of(COSINES)
    with caplog.at_level(logging.WARNING):
        assert Tuned(Known((record_of(COSINES, foreign, **fields),)))([COSINES]) == {}
    assert f"tuning record here/generic.jsonl:4 {said}" in caplog.text
    assert facts_of(COSINES) == before  # what begins to fit leaves nothing behind


def test_records_of_operators_that_the_model_lacks_are_no_matter(caplog: pytest.LogCaptureFixture) -> None:
    assert Tuned(Known((record_of(COSINES, Trace(rules())),)))([SUMS]) == {}
    assert not caplog.records
    assert facts_of(COSINES).operator == "tir_cos"


def test_a_trace_that_adds_up_in_another_order_is_wrong(compilers: Compilers, measurer: Measurer) -> None:
    def regroup(schedule: Any) -> None:
        *_, summed = schedule.get_loops(schedule.get_sblock("sum"))
        _, inner = schedule.split(summed, [None, 8])
        schedule.rfactor(inner, 1)

    task = task_of(SUMS)
    default, other = (compiled(compilers, task, tile) for tile in (task.space[0], trace(regroup, bare(sums))))
    assert isinstance(measurer.measure(task.problem, default, default), Timing)
    assert measurer.measure(task.problem, default, other) == Failure("wrong", "gives other bits than the default tile")


def compiled(compilers: Compilers, task: Task, tile: Trace) -> Candidate:
    candidate = compilers.submit(task.schedule, task.facts, tile, task.target).result()
    assert isinstance(candidate, Candidate), candidate
    return candidate


def test_a_search_that_hangs_ends_its_task(compilers: Compilers, measurer: Measurer, tmp_path: Path) -> None:
    [progress] = run_sweep(task_of(COSINES), tmp_path, compilers, measurer, limit_s=0.01).tasks
    assert progress.done == "all tiles tried" and len(progress.measured) == 1 and progress.best_us
