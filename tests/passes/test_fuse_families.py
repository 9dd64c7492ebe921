"""Every model family fuses fully: all that is left plain are angles, residual sums and views."""

import pytest

from tests.passes.spellings import check_round_trip, composites, operators, random_weights, run
from tests.tolerances import assert_close
from tilewright.compiler.checkpoint import ModelConfig, Rope
from tilewright.compiler.relax_utils import bindings, composite_of, main_function, param_entries
from tilewright.compiler.verify import verify
from tilewright.models.registry import build_model
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.combine_projections import CombineProjections
from tilewright.passes.fuse_attention import FuseAttention
from tilewright.passes.fuse_gated_mlp import FuseGatedMlp
from tilewright.passes.fuse_linear import FuseLinear
from tilewright.passes.fuse_norm import FuseNorm
from tilewright.passes.fuse_rope import FuseRope

PASSES = (FuseAttention(), FuseRope(), FuseNorm(), FuseGatedMlp(), FuseLinear(), CombineProjections())
YARN = (("type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 16))
COMMON = {
    "hidden": 30,
    "layers": 2,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 10,
    "intermediate": 14,
    "vocab": 23,
    "norm_eps": 1e-6,
    "rope": Rope(1e4),
    "max_position": 64,
}
CONFIGS = {
    "llama": {"tied": False},
    "llama_yarn_one_kv_head": {"family": "llama", "rope": Rope(1e4, YARN), "kv_heads": 1},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma3": {
        "qk_norm": True,
        "sandwich_norms": True,
        "activation": "gelu_tanh",
        "window": 3,
        "window_layers": (0,),
        "window_rope": Rope(1e3),
        "embed_scale": 5.5,
        "attention_scale": 0.3,
    },
}
LEFT = {"arange", "astype", "expand_dims", "reshape", "cos", "sin", "multiply", "add", "strided_slice"}


def config(name):
    return ModelConfig(**{"family": name, **COMMON, **CONFIGS[name]})


@pytest.fixture(scope="module", params=CONFIGS)
def family(request):
    """(configuration, plain module, fused module), verified after every pass."""
    c = config(request.param)
    plain = Canonicalize()(build_model(c))
    verify(plain, "model")
    fused = plain
    for p in PASSES:
        fused = p(fused)
        verify(fused, "fused")
    return c, plain, fused


def test_all_composites_are_found(family):
    c, _, fused = family
    norms = 2 + 2 * c.qk_norm + 2 * c.sandwich_norms
    assert composites(fused) == {
        "embedding": 1,
        "rms_norm": norms * c.layers + 1,
        "linear": 4 * c.layers + 1,
        "rope": 2 * c.layers,
        "attention": c.layers,
        "gated": c.layers,
    }


def test_nothing_else_is_left(family):
    c, _, fused = family
    left = operators(fused)
    tables = 2 if c.window_rope else 1
    assert set(left) <= LEFT
    assert left["add"] == 2 * c.layers and left["cos"] == left["sin"] == tables
    assert left["strided_slice"] == 3 * c.layers, "q, k, v of the joint projection"
    assert left["multiply"] <= 3 * tables, "angles, and yarn's factor on cosines and sines"


def test_windows_and_parameters(family):
    c, _, fused = family
    _, func = main_function(fused)
    found = (composite_of(fused, b.value) for b in bindings(func))
    windows = [f[1].window for f in found if f is not None and f[0] == "attention"]
    assert windows == [c.window if i in c.window_layers else None for i in range(c.layers)]
    entries = {e["name"]: e for e in param_entries(func)}
    assert entries["layers.1.attn.qkv"]["sources"] == [f"layers.1.attn.{p}.weight" for p in "qkv"]
    assert entries["layers.1.mlp.gate_up"]["sources"] == [f"layers.1.mlp.{p}.weight" for p in ("gate", "up")]
    assert ("layers.1.attn.qkv.bias" in entries) == c.attention_bias


def test_fused_equals_plain_and_parses_back(family):
    c, plain, fused = family
    check_round_trip(fused)
    entries = param_entries(main_function(plain)[1])
    weights = random_weights({e["sources"][0]: tuple(e["shape"]) for e in entries}, seed=9)
    tokens = [(7 * i + 3) % c.vocab for i in range(8)]
    assert_close(run(fused, tokens, weights), run(plain, tokens, weights))


def test_hidden_states_come_out_beside_the_logits():
    mod = Canonicalize()(build_model(config("llama"), taps=True))
    verify(mod, "model")
    for p in PASSES:
        mod = p(mod)
        verify(mod, "fused")
    results = main_function(mod)[1].ret_ty.fields
    assert [int(r.shape.values[1]) for r in results] == [COMMON["vocab"], COMMON["hidden"], COMMON["hidden"]]
