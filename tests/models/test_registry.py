"""The module that every family becomes: signature, attributes, and what is emitted once for all layers."""

import json
from collections import Counter
from typing import Any

import pytest
import tvm
from tvm import ir, relax

from tilewright.compiler.checkpoint import ModelConfig, Rope
from tilewright.compiler.errors import ModelError
from tilewright.compiler.parameters import FAMILIES as FAMILY_NAMES
from tilewright.compiler.parameters import parameter_shapes
from tilewright.models.registry import FAMILIES, build_model


def config(family: str = "llama", **overrides: Any) -> ModelConfig:
    fields = {
        "family": family,
        "hidden": 40,
        "layers": 3,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 10,
        "intermediate": 56,
        "vocab": 101,
        "norm_eps": 1e-5,
        "rope": Rope(1e4),
        "max_position": 64,
        "qk_norm": family in ("qwen3", "gemma3"),
        "sandwich_norms": family == "gemma3",
    }
    return ModelConfig(**{**fields, **overrides})


def operators(mod: tvm.IRModule) -> Counter[str]:
    bindings = [b for block in mod["forward"].body.blocks for b in block.bindings]
    return Counter(b.value.op.name for b in bindings if isinstance(b.value, ir.Call))


def test_one_list_of_families() -> None:
    assert tuple(FAMILIES) == FAMILY_NAMES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_signature_and_attributes(family: str, tied: bool) -> None:
    c = config(family, tied=tied, attention_bias=family == "qwen2")
    mod = build_model(c)
    relax.analysis.well_formed(mod)
    forward, shapes = mod["forward"], parameter_shapes(c)
    assert int(forward.attrs["num_input"]) == 1
    assert str(forward.attrs["tw.stage"]) == "model"
    entries = json.loads(str(forward.attrs["tw.params"]))
    assert [e["sources"] for e in entries] == [[name] for name in shapes]
    assert [tuple(e["shape"]) for e in entries] == list(shapes.values())
    assert {e["format"] for e in entries} == {"f32"}
    tokens, *params = forward.params
    assert str(tokens.ty.dtype) == "int32"
    assert [p.name for p in params] == [e["name"].replace(".", "_") for e in entries]
    assert [tuple(int(x) for x in p.ty.shape) for p in params] == list(shapes.values())
    assert ("lm_head.weight" in shapes) is not tied


def test_every_parameter_is_read() -> None:
    """A weight that a family forgot would not show in the signature."""
    c = config("gemma3", attention_bias=True, output_bias=True, mlp_bias=True, tied=False)
    forward = build_model(c)["forward"]
    free = relax.analysis.free_vars(forward.body)
    assert [p.name for p in forward.params if not any(p.same_as(v) for v in free)] == []


def test_layers_share_tables_and_masks() -> None:
    """One rotation and one mask for each kind of layer, however many layers there are."""
    full = operators(build_model(config()))
    assert full["relax.cos"] == full["relax.sin"] == full["relax.less_equal"] == 1
    mixed = operators(build_model(config("gemma3", window=4, window_layers=(0, 2), window_rope=Rope(1e3))))
    assert mixed["relax.cos"] == mixed["relax.less_equal"] == 2
    same_rope = operators(build_model(config("llama", window=4, window_layers=(1,))))
    assert (same_rope["relax.cos"], same_rope["relax.less_equal"]) == (1, 2)


def test_taps_return_every_layer() -> None:
    mod = build_model(config(), taps=True)
    fields = mod["forward"].ret_ty.fields
    assert [int(f.shape[1]) for f in fields] == [101, 40, 40, 40]


def test_module_parses_back() -> None:
    mod = build_model(config("gemma3", window=4, window_layers=(0, 2)))
    again = tvm.script.from_source(mod.script(show_meta=True))
    tvm.ir.assert_structural_equal(mod, again, map_free_vars=True)


def test_unknown_family() -> None:
    with pytest.raises(ModelError, match="family 'rwkv' is unknown; known are llama, qwen2, qwen3, gemma3"):
        build_model(config("rwkv"))


def test_contradiction() -> None:
    with pytest.raises(ModelError, match="6 attention heads can't be shared among 4 KV heads"):
        build_model(config(kv_heads=4))
