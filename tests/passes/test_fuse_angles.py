"""The tables of rotations in one composite, numerically as before."""

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.passes.served_models import Tiny, assert_same_steps, composite_names, fused_model, round_trip
from tilewright.compiler.relax_utils import Emitter, bindings, main_function, op_name, rebuild
from tilewright.compiler.verify import verify
from tilewright.passes.fuse_angles import FuseAngles
from tilewright.passes.fuse_qkv_append import FuseQKVAppend
from tilewright.passes.insert_paged_kv import InsertPagedKV


@pytest.fixture(scope="module")
def before() -> tvm.IRModule:
    return FuseQKVAppend().run(InsertPagedKV(4).run(fused_model(Tiny())))


def operators(mod: tvm.IRModule) -> set[str | None]:
    return {op_name(b.value) for b in bindings(main_function(mod)[1])}


def with_frequencies(mod: tvm.IRModule, change) -> tvm.IRModule:
    """The module with `change(emitter, call)` in place of the product of positions and frequencies."""
    [(var, product)] = [(b.var, b.value) for b in bindings(main_function(mod)[1]) if op_name(b.value) == "multiply"]
    return rebuild(mod, {var: lambda emitter: change(emitter, product)})


def test_steps_are_as_before(before: tvm.IRModule) -> None:
    assert {"cos", "sin"} <= operators(before)
    after = FuseAngles().run(before)
    verify(after, "served")
    round_trip(after)
    assert composite_names(after).count("angles") == 1 and not {"cos", "sin", "multiply"} & operators(after)
    assert_same_steps(before, after, Tiny())


def test_factors_in_the_other_order(before: tvm.IRModule) -> None:
    def swapped(emitter: Emitter, product):
        return relax.op.multiply(*(emitter.map(a) for a in reversed(product.args)))

    assert composite_names(FuseAngles().run(with_frequencies(before, swapped))).count("angles") == 1


def test_a_table_that_alone_is_used(before: tvm.IRModule) -> None:
    """Where sines are made in another way."""
    [sine] = [b.var for b in bindings(main_function(before)[1]) if op_name(b.value) == "sin"]
    angles = {b.var: b.value for b in bindings(main_function(before)[1])}[sine].args[0]
    changed = rebuild(before, {sine: lambda emitter: relax.op.tan(emitter.map(angles))})
    after = FuseAngles().run(changed)
    assert composite_names(after).count("angles") == 1 and {"tan", "multiply"} <= operators(after)


def test_angles_of_another_making_stay(before: tvm.IRModule) -> None:
    def one_frequency(emitter: Emitter, product):
        half = Tiny().head_dim // 2
        wide = emitter(relax.op.broadcast_to(emitter.map(product.args[0]), [product.ty.shape.values[0], half]))
        return relax.op.multiply(wide, relax.const(np.float32(0.5)))

    after = FuseAngles().run(with_frequencies(before, one_frequency))
    assert "angles" not in composite_names(after) and {"cos", "sin"} <= operators(after)
