"""The plain operators of a model's steps as tasks, for a CPU: MetaSchedule searches them (metaschedule.py)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tvm
from tvm import ir, relax

from tilewright.compiler.calls import Call
from tilewright.compiler.codegen.llvm_target import llvm_target
from tilewright.compiler.codegen.plain_operators import Operator, fixed, fuse, operators
from tilewright.compiler.relax_utils import composite_of
from tilewright.compiler.targets.base import Target
from tilewright.schedules.generic import NAME, Generic, OperatorSpec, facts_of
from tilewright.tuner import loops
from tilewright.tuner.tasks import Key, Task, function_of, steps_of
from tilewright.tuner.workloads import Step


def extract_operators(mod: Any, target: Target, workload: Sequence[Step]) -> list[Task]:
    """The plain operators of a module whose composites have not been lowered, those with the most of the workload's
    time first. None for a GPU, whose plain operators run as TVM's default schedules say."""
    if target.kind != "cpu":
        return []
    with llvm_target(target):
        found = operators(fuse(_opaque(mod)))
    share = sum(step.share for step in workload)
    names = steps_of(mod)
    tasks: dict[Key, Task] = {}
    for operator in found:
        task = operator_task(operator, target)
        known = tasks.setdefault(task.key, task)
        calls, load_us = known.calls, known.load_us
        for step in workload:
            times = operator.calls.get(function_of(step, names), 0) * step.share / share
            calls += times
            load_us += times * task.least_us(_rows(operator, step))
        tasks[task.key] = replace(known, calls=calls, load_us=load_us)
    return sorted(tasks.values(), key=lambda task: (-task.load_us, task.key))


def _rows(operator: Operator, step: Step) -> int:
    if not operator.symbol:
        return operator.rows
    return step.sequences if operator.symbol == "r" else step.tokens


def _opaque(mod: Any) -> Any:
    """The module's steps alone, their composites calls of something that is not known: so they stand among kernels
    when a compile fuses plain operators."""

    @relax.expr_functor.mutator
    class Rewrite(relax.PyExprMutator):
        def visit_call_(self, call: ir.Call) -> Any:
            visited = super().visit_call_(call)
            if composite_of(mod, call) is None:
                return visited
            types = list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]
            return relax.op.call_dps_packed("opaque", list(visited.args), out_ty=types)

    rewrite = Rewrite(mod)
    return tvm.IRModule({name: rewrite.visit_expr(func) for name, func in steps_of(mod).items()}, mod.attrs)


def operator_task(operator: Operator, target: Target) -> Task:
    """The task of an operator, not weighted by any workload."""
    facts = facts_of(operator)
    reference, why_not = "", ""
    size, operations = 0, 0
    try:
        reference = loops.written(fixed(operator.func, operator.shapes))
        size, operations = loops.work(reference, operator.shapes, operator.dtypes, operator.inputs)
    except loops.Unknown as unknown:
        why_not = f"no reference in numpy for {unknown}"
    each = [-(-total // operator.rows) for total in (size, operations)]
    spec = OperatorSpec(facts, operator.shapes, operator.dtypes, operator.inputs, reference, max(1, each[0]), each[1])
    call = Call(NAME, spec, None if operator.symbol else operator.rows, operator.rows)
    return Task(Generic(spec, tvm.ir.save_json(operator.func)), facts, call, target, why_not=why_not)
