"""Families through every pass up to the step that draws, against the plain mathematics they came from."""

from dataclasses import replace

import numpy as np
import pytest
import tvm

from tests.passes.served_models import Batch, composite_names, random_params, round_trip
from tests.reference import compile_module
from tests.tolerances import assert_close
from tilewright.compiler.checkpoint import ModelConfig, Rope
from tilewright.compiler.relax_utils import bindings, op_name, param_entries, remove_dead_code
from tilewright.compiler.verify import verify
from tilewright.models.quant import FORMATS
from tilewright.models.registry import build_model
from tilewright.passes.pipeline import PipelineOptions, pipeline
from tilewright.passes.plan_buckets import PlanBuckets

PAGE_SIZE = 4
LLAMA = ModelConfig(
    family="llama",
    hidden=32,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    intermediate=64,
    vocab=43,
    norm_eps=1e-5,
    rope=Rope(1e4),
    max_position=64,
)
QWEN3 = replace(LLAMA, family="qwen3", qk_norm=True, head_dim=10, heads=3, kv_heads=3, tied=False)
GEMMA3 = replace(
    LLAMA,
    family="gemma3",
    qk_norm=True,
    activation="gelu_tanh",
    attention_scale=0.3,
    window=3,
    window_layers=(0,),
    window_rope=Rope(1e3),
    embed_scale=32**0.5,
    sandwich_norms=True,
)


def served(mod, formats: tuple[tuple[str, str], ...]):
    """The module after the passes up to lower_sampling, verified at the end of each stage."""
    options = PipelineOptions(
        formats=formats,
        narrow=(),
        page_size=PAGE_SIZE,
        strict=False,
        k_transposed=True,
        activations="float32",
        kv_dtype="float32",
        decode_buckets=(),
        any_decode=False,
        max_tokens=16,
        max_batch=4,
        top_logprobs=5,
        choose=lambda *_: None,
        takes_norm=lambda spec: True,
    )
    for stage, passes in pipeline(options)[:2]:
        for p in passes:
            if not isinstance(p, PlanBuckets):
                mod = p.run(mod)
        verify(mod, stage)
    return mod


def stored(mod, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The parameters as the served module takes them: sources joined by rows, matrices packed."""
    params = []
    for entry in param_entries(mod["logits"]):
        value = np.concatenate([values[s] for s in entry["sources"]])
        params.append(FORMATS[entry["format"]].pack(value) if value.ndim == 2 else value)
    return params


def check(config: ModelConfig, chosen: dict[str, str], taps: bool = False):
    """The served module gives in steps what `forward` gives at once. `chosen`: formats other than f32 by suffix."""
    rng = np.random.default_rng()
    plain = build_model(config, taps=taps)
    entries = param_entries(plain["forward"])
    names = [e["sources"][0] for e in entries]
    formats = {n: next((f for suffix, f in chosen.items() if n.endswith(suffix)), "f32") for n in names}
    params = random_params(plain["forward"], rng)
    for k, name in enumerate(names):  # values that their format holds exactly
        if params[k].ndim == 2:
            pack = FORMATS[formats[name]]
            params[k] = pack.unpack(pack.pack(params[k]), *params[k].shape)
    mod = served(plain, tuple(formats.items()))
    forward = compile_module(plain)
    function = "layers" if taps else "logits"
    batch = Batch(_only(mod, function), stored(mod, dict(zip(names, params, strict=True))), PAGE_SIZE)
    for lengths in ({0: 7, 1: 2}, {1: 5, 0: 1}, {0: 1, 1: 1}):
        request = {s: rng.integers(0, config.vocab, n).tolist() for s, n in lengths.items()}
        got = batch.step(request, function=function)
        for k, sequence in enumerate(request):
            whole = forward(np.array(batch.tokens[sequence], "int32"), *params)
            for a, b in zip(got if taps else [got], whole if taps else [whole], strict=True):
                assert_close(a[k], b[-1], "logits_float32")
    return mod


def _only(mod, function: str):
    """`function` beside `logits`, whose parameters say how pages look; what is not run is not compiled."""
    others = {"layers", "step"} - {function}
    rest = tvm.IRModule({g: f for g, f in mod.functions.items() if g.name_hint not in others})
    return remove_dead_code(rest, *{"logits", function})


@pytest.mark.parametrize("config", [LLAMA, QWEN3, GEMMA3], ids=lambda c: c.family)
def test_a_family_is_served_as_it_is_written(config):
    mod = check(config, {})
    names = composite_names(mod)
    assert names.count("qkv_append") == names.count("paged_attention") == config.layers
    assert not {"rope", "gated", "kv_append"} & set(names)
    assert names.count("rms_norm") == (2 * config.layers if config.sandwich_norms else 0)
    assert composite_names(mod, "step") == [*names, "sample"]
    assert "concat" not in [op_name(b.value) for b in bindings(mod["logits"])]


def test_projections_of_different_formats_are_joined_after_their_linears():
    mod = check(replace(LLAMA, attention_bias=True), {"attn.v.weight": "q8_0", "mlp.up.weight": "f16"})
    assert composite_names(mod).count("qkv_append") == LLAMA.layers
    round_trip(mod)


def test_taps_come_out_for_the_wanted_rows():
    round_trip(check(GEMMA3, {"embed.weight": "q4_1"}, taps=True))
