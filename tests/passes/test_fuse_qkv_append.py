"""Projection, norm, rotation and append in one composite, numerically as before."""

from dataclasses import replace

import pytest
import tvm

from tests.passes.served_models import Tiny, assert_same_steps, composite_names, fused_model, round_trip
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import bindings, composite_of, main_function, op_name, rebuild
from tilewright.compiler.verify import verify
from tilewright.passes.fuse_qkv_append import FuseQKVAppend
from tilewright.passes.insert_paged_kv import InsertPagedKV

SEPARATE = Tiny(heads=3, kv_heads=1, head_dim=10, qk_norm=True, joint_qkv=False, bias=True)


@pytest.mark.parametrize("c", [Tiny(), SEPARATE], ids=["joint", "separate-norm-bias"])
def test_steps_are_as_before(c):
    before = InsertPagedKV(4).run(fused_model(c))
    after = FuseQKVAppend().run(before)
    verify(after, "served")
    round_trip(after)
    names = composite_names(after)
    assert names.count("qkv_append") == 2 and not {"kv_append", "rope"} & set(names)
    assert names.count("rms_norm") == composite_names(before).count("rms_norm") - (4 if c.qk_norm else 0)
    assert_same_steps(before, after, c)


def test_joint_projection_goes_in_whole_and_separate_ones_are_joined():
    joint = FuseQKVAppend().run(InsertPagedKV(4).run(fused_model(Tiny(windows=(None, None)))))
    calls = [b.value for b in bindings(joint["logits"]) if (composite_of(joint, b.value) or ("",))[0] == "qkv_append"]
    definition = {b.var: b.value for b in bindings(joint["logits"])}
    assert all(composite_of(joint, definition[call.args[0]])[0] == "linear" for call in calls)
    separate = FuseQKVAppend().run(InsertPagedKV(4).run(fused_model(replace(SEPARATE, windows=(None,)))))
    operators = [op_name(b.value) for b in bindings(separate["logits"])]
    assert operators.count("concat") == 1 and operators.count("reshape") == 1  # the latter after attention


def without(mod: tvm.IRModule, composite: str, which: int) -> tvm.IRModule:
    """The module with one call of a composite replaced by its first argument."""
    calls = [b for b in bindings(main_function(mod)[1]) if (composite_of(mod, b.value) or ("",))[0] == composite]
    call = calls[which]
    return rebuild(mod, {call.var: lambda emit: emit.map(call.value.args[0])})


def test_a_layer_without_rotation_is_refused_by_name():
    served = InsertPagedKV(4).run(fused_model(Tiny()))
    for which, name in ((0, "q"), (1, "k")):
        with pytest.raises(CompileError, match=f"attention layer 0 uses {name} without a rope"):
            FuseQKVAppend().run(without(served, "rope", which))


def test_a_norm_on_q_alone_is_refused():
    served = InsertPagedKV(4).run(fused_model(Tiny(qk_norm=True)))
    k_norm_of_layer_1 = 2 + 4  # attn_norm, q, k, mlp_norm; attn_norm, q, k
    with pytest.raises(CompileError, match=r"attention layer 1 normalises q as .* and k as None"):
        FuseQKVAppend().run(without(served, "rms_norm", k_norm_of_layer_1))
