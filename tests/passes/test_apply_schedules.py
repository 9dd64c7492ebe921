"""Composites become kernels: which, how often, and with the numbers of the bodies that they replace."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from tests.kernel_runner import host_target
from tests.passes.scheduled_models import BuiltBatch, kernel_names, served_model
from tests.passes.served_models import Batch, Tiny, composite_names, random_params
from tests.passes.test_lower_sampling import sampling_arrays
from tests.tolerances import assert_close
from tilewright.compiler.describe import kernel_calls, references
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import param_entries
from tilewright.compiler.verify import verify
from tilewright.models.quant import FORMATS
from tilewright.passes.apply_schedules import ApplySchedules
from tilewright.passes.plan_buckets import PlanBuckets
from tilewright.schedules.base import KernelCall, Output
from tilewright.schedules.order import Chooser

MODEL = Tiny(hidden=32, inter=48, heads=6, kv_heads=2, head_dim=8, vocab=37, windows=(None, None, 3))
PLAN = PlanBuckets(decode=(1,), max_tokens=24, max_batch=3)
APPLY = ApplySchedules(choose=Chooser(host_target()))


@pytest.fixture(scope="module")
def before() -> tvm.IRModule:
    return PLAN.run(served_model(MODEL))


@pytest.fixture(scope="module")
def after(before: tvm.IRModule) -> tvm.IRModule:
    return APPLY.run(before)


def composites_called(mod: tvm.IRModule, function: str) -> Counter[str]:
    """Calls by composite. Of the kernels of one call, its last carries the floor."""
    about = {name: json.loads(str(mod[name].attrs["tw.kernel"])) for name in kernel_names(mod)}
    calls: Counter[str] = Counter()
    for kernel, count in kernel_calls(mod)[function].items():
        if about[kernel]["floor"] is not None:
            calls[about[kernel]["composite"]] += count
    return calls


def test_every_composite_call_becomes_a_kernel_call(before: tvm.IRModule, after: tvm.IRModule) -> None:
    verify(after, "scheduled")
    assert not [g.name_hint for g, f in after.functions.items() if "tw.composite" in (f.attrs or {})]
    for function in ("step", "step_1", "logits"):
        assert composites_called(after, function) == Counter(composite_names(before, function))
        assert composite_names(after, function) == []


def test_equal_calls_share_a_kernel(after: tvm.IRModule) -> None:
    """Layers 0 and 1 are alike, layer 2 has a window: a kernel for two layers and one for the third."""
    attention = [n for n in kernel_names(after) if n.startswith("paged_attention")]
    calls = kernel_calls(after)
    for function in ("step", "step_1", "logits"):
        assert sorted(calls[function][n] for n in attention if n in calls[function]) == [1, 2]


def test_a_kernel_is_named_after_its_content(after: tvm.IRModule) -> None:
    assert kernel_names(APPLY.run(PLAN.run(served_model(MODEL)))) == kernel_names(after)
    other = Tiny(**{**vars(MODEL), "inter": 56})
    changed = set(kernel_names(APPLY.run(PLAN.run(served_model(other))))) ^ set(kernel_names(after))
    assert changed and not any(n.startswith(("paged_attention", "sample", "embedding")) for n in changed)


def test_built_and_run(before: tvm.IRModule, after: tvm.IRModule, tmp_path: Path) -> None:
    """Ragged prefill, a chunk beside a decode, and lone decodes: the numbers of the reference bodies."""
    rng = np.random.default_rng()
    params = random_params(before["logits"], rng)
    reference, kernels = Batch(before, params, 16), BuiltBatch(after, tmp_path, params)
    for lengths, all_rows in (({0: 18, 1: 1}, True), ({1: 5, 0: 1, 2: 17}, False), ({2: 1}, False)):
        request = {s: rng.integers(0, MODEL.vocab, n).tolist() for s, n in lengths.items()}
        assert_close(kernels.step(request, all_rows), reference.step(request, all_rows), "logits_float32")


@pytest.mark.parametrize("weight_format,activation_bits", [("f32", 16), ("q4_1", 8)])
def test_step_and_step_1_give_the_same_bits(weight_format: str, activation_bits: int, tmp_path: Path) -> None:
    """Their kernels differ where a schedule is for one row alone."""
    model = Tiny(hidden=64, inter=96, heads=4, kv_heads=2, head_dim=16, vocab=45, windows=(None,))
    mod = APPLY.run(PLAN.run(served_model(model, weight_format=weight_format, activation_bits=activation_bits)))
    calls = kernel_calls(mod)
    assert weight_format == "f32" or set(calls["step"]) != set(calls["step_1"])
    params = _stored(mod, np.random.default_rng())
    general = BuiltBatch(mod, tmp_path, params)
    alone = Batch(mod, params, 16, compiled=general.compiled)
    for batch in (general, alone):
        batch.step({0: [1, 2, 3]})
    one, two = (sampling_arrays(rows, temperature=0.9, seeds=3) for rows in (1, 2))
    for token in (4, 5):
        # A second sequence keeps the general step from being a lone decode.
        pair = general.step({0: [token], 1: [token]}, function="step", sampling=two)
        own = alone.step({0: [token]}, function="step_1", sampling=one)
        for got, want in zip(own, pair, strict=True):
            np.testing.assert_array_equal(got[0], want[0])


def _stored(mod: tvm.IRModule, rng: np.random.Generator) -> list[np.ndarray]:
    """Random weights, packed as the module takes them."""
    entries = param_entries(mod["logits"])
    values = [rng.normal(size=e["shape"]).astype("float32") * 0.3 for e in entries]
    return [FORMATS[e["format"]].pack(v) if v.ndim == 2 else v + 1 for e, v in zip(entries, values, strict=True)]


def test_what_no_schedule_takes_is_refused_with_every_reason() -> None:
    mod = PLAN.run(served_model(Tiny(windows=(None,)), page_size=4))
    with pytest.raises(CompileError, match=r"has no kernel on test-host .*: \w+: page size 4 is not a multiple of 16"):
        APPLY.run(mod)


def test_what_no_schedule_knows_is_refused(before: tvm.IRModule) -> None:
    with pytest.raises(CompileError, match=r"has no kernel on test-host .*: no schedule for cpu knows it"):
        ApplySchedules(choose=Chooser(host_target(), order=())).run(before)


class _Unscheduled(Chooser):
    """Knows no schedule for one composite, and lets it run by its body, as on a GPU."""

    def __call__(self, call):
        return None if call.composite == "qkv_append" else super().__call__(call)


def test_what_has_no_schedule_runs_by_its_body(before: tvm.IRModule, after: tvm.IRModule, tmp_path: Path) -> None:
    mod = ApplySchedules(choose=_Unscheduled(host_target())).run(before)
    verify(mod, "scheduled")
    assert references(mod) == ("3 calls of qkv_append run slowly, by the reference body: no schedule takes them",)
    assert references(after) == ()
    params = random_params(before["logits"], np.random.default_rng())
    by_body, kernels = BuiltBatch(mod, tmp_path, params), Batch(before, params, 16)
    for request in ({0: [1, 2, 3, 4], 1: [5]}, {1: [6], 0: [7]}):
        assert_close(by_body.step(request), kernels.step(request), "logits_float32")


def test_a_shared_kernel_is_called_once(before: tvm.IRModule) -> None:
    """A kernel that reads the same in every layer, in front of each attention: made once a function."""

    class Planned(Chooser):
        def __call__(self, call):
            choice = super().__call__(call)
            if call.composite != "paged_attention":
                return choice
            plan = KernelCall(_plan, (2,), (Output("plan", (1,), "int32"),), shared=True)
            return replace(choice, lowering=replace(choice.lowering, kernels=(plan, *choice.lowering.kernels)))

    calls = kernel_calls(ApplySchedules(choose=Planned(host_target())).run(before))
    for function in ("step", "step_1", "logits"):
        attention = [n for name, n in calls[function].items() if name.startswith("paged_attention")]
        assert sum(attention) == 3 + 1


@T.prim_func(s_tir=True)
def _plan(positions_handle: T.handle, plan_handle: T.handle):
    t = T.int64()
    T.match_buffer(positions_handle, (t,), "int32")
    plan = T.match_buffer(plan_handle, (1,), "int32")
    with T.sblock("plan"):
        plan[0] = 1
