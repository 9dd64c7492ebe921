"""The step in variants: bounds on what stays symbolic, and a lone decode of its own that says the same."""

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from tests.passes.scheduled_models import served_model
from tests.passes.served_models import Batch, Tiny, composite_names, random_params, round_trip
from tests.passes.test_lower_sampling import sampling_arrays
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import bindings, op_name
from tilewright.compiler.verify import verify
from tilewright.passes.plan_buckets import PlanBuckets

PLAN = PlanBuckets(decode=(1, 2), max_tokens=24, max_batch=3)


@pytest.fixture(scope="module")
def before() -> tvm.IRModule:
    return served_model(Tiny(windows=(None,)))


@pytest.fixture(scope="module")
def after(before: tvm.IRModule) -> tvm.IRModule:
    return PLAN.run(before)


def extents(func: relax.Function) -> dict[str, list[int | str]]:
    """The shapes of a step's inputs: numbers where static, else names."""
    params = list(func.params)[: int(func.attrs["num_input"])]
    return {p.name: [int(e) if isinstance(e, tirx.IntImm) else str(e) for e in p.ty.shape.values] for p in params}


def test_before(before: tvm.IRModule) -> None:
    assert extents(before["step"])["tokens"] == ["t"]
    assert "tir_var_upper_bound" not in before["step"].attrs


def test_after(before: tvm.IRModule, after: tvm.IRModule) -> None:
    verify(after, "served")
    round_trip(after)
    added = {g.name_hint for g in after.functions} - {g.name_hint for g in before.functions}
    assert added == {"step_1", "step_2"}
    for name, rows in (("step", 3), ("logits", 24)):
        bounds = {str(k): int(v) for k, v in after[name].attrs["tir_var_upper_bound"].items()}
        assert bounds == {"t": 24, "b": 3, "r": rows}
        assert extents(after[name]) == extents(before[name])


@pytest.mark.parametrize("size", PLAN.decode)
def test_a_bucket_is_static_in_tokens_sequences_and_rows(after: tvm.IRModule, size: int) -> None:
    func = after[f"step_{size}"]
    assert str(func.attrs["global_symbol"]) == f"step_{size}"
    shapes = extents(func)
    assert shapes["tokens"] == shapes["kv_len"] == shapes["rows"] == shapes["temperature"] == [size]
    assert shapes["page_indices"] == ["p"] and shapes["pages"][1] == "num_pages"
    assert {v.name for v in relax.analysis.defined_symbolic_vars(func)}.isdisjoint("tbr")
    assert composite_names(after, f"step_{size}") == composite_names(after, "step")


def test_only_the_general_step_selects_rows(after: tvm.IRModule) -> None:
    taken = {name: [op_name(b.value) for b in bindings(after[name])].count("take") for name in ("step", "step_1")}
    assert taken["step"] > 0 and taken["step_1"] == 0


def test_a_bucket_gives_the_bits_of_the_step(after: tvm.IRModule) -> None:
    """Two prompts, then decodes: by the general step, each alone by step_1, both by step_2."""
    params = random_params(after["logits"], np.random.default_rng())
    first = Batch(after, params, 16)
    second = Batch(after, params, 16, compiled=first.compiled)
    for batch in (first, second):
        batch.step({0: [1, 2, 3], 1: [4]})
    arrays = {n: sampling_arrays(n, temperature=0.9, seeds=3) for n in (1, 2)}
    for request, function in (({0: [5]}, "step_1"), ({0: [6], 1: [7]}, "step_2"), ({1: [8]}, "step_1")):
        chosen = arrays[len(request)]
        expected = first.step(request, function="step", sampling=chosen)
        for got, want in zip(second.step(request, function=function, sampling=chosen), expected, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("max_tokens", "max_batch"), [(8, 9), (8, 0), (0, 0)])
def test_a_step_holds_a_token_of_every_sequence(max_tokens: int, max_batch: int) -> None:
    with pytest.raises(CompileError, match=f"max batch is {max_batch}, max tokens {max_tokens}: .*; raise"):
        PlanBuckets((), max_tokens, max_batch)


def test_a_step_decodes_batches_of_any_size(before: tvm.IRModule) -> None:
    after = PlanBuckets(decode=(), max_tokens=24, max_batch=3, any_decode=True).run(before)
    verify(after, "served")
    round_trip(after)
    func = after["step_decode"]
    assert {str(k): int(v) for k, v in func.attrs["tir_var_upper_bound"].items()} == {"n": 3}
    assert func.attrs["tw.decode"] and "tw.decode" not in after["step"].attrs
    shapes = extents(func)
    assert shapes["tokens"] == shapes["kv_len"] == shapes["rows"] == shapes["temperature"] == ["n"]
    assert composite_names(after, "step_decode") == composite_names(after, "step")
