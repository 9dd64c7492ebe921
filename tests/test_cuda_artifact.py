"""Models cross-compiled for Hopper: the machine code in their artifacts is what their manifests promise.

The kernels to look at come from the manifest, and all of its schedules are named here: a kernel that is renamed, or
a new one, fails a test until somebody has said what it has to look like.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tilewright
from tests.conftest import REAL_MODEL
from tests.cubins import DeviceKernel, device_kernels
from tests.runtime.test_cuda_imports import check
from tests.stand_in_cuda import run_with_stand_in
from tilewright.compiler.artifact import Artifact
from tilewright.compiler.frontends.packages import PACKAGED_MODELS
from tilewright.schedules.cuda.linear import Linear

# Every schedule that a Llama's step consists of.
SCHEDULES = {"angles", "embedding", "linear", "paged_attention", "qkv_append", "rms_norm", "sample"}

STEPS = ("step", "step_decode")  # of any tokens, and of one generated token each of some sequences

# Two layers of an 8B Llama, with SmolLM2's vocabulary: its sampler is compiled once for both.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SMOLLM2 = LLAMA_8B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_hidden_layers": 30,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """An artifact and the device code in it."""

    artifact: Artifact
    device: Mapping[str, DeviceKernel]

    def kernels(self, schedule: str | None = None) -> list[Mapping[str, Any]]:
        """The manifest's kernels, or those of one schedule, without the host functions that pick one of several."""
        kernels = self.artifact.manifest.kernels
        return [k for k in kernels if schedule in (None, k["schedule"]) and "picks" not in k]

    def code(self, kernel: Mapping[str, Any]) -> DeviceKernel:
        return self.device[f"{kernel['name']}_kernel"]

    @property
    def small(self) -> bool:
        """Whether it is SmolLM2, whose layers' linears have kernels for few tokens."""
        return self.artifact.manifest.model["layers"] == 30

    def calls(self, schedule: str, step: str) -> int:
        return sum(k["calls"].get(step, 0) for k in self.artifact.manifest.kernels if k["schedule"] == schedule)


@pytest.fixture(scope="module", params=["smollm2", "8b"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """With few tiles, since to compile all of them takes a minute a model: for one token, up to 16, and up to 2048."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "bounds", lambda *_: (16,) if request.param == "smollm2" else ())
        model, weights = _source(request.param, folder)
        artifact = tilewright.compile(
            model, target="nvidia-h100", weights=weights, max_batch=1, max_tokens=2048, output=folder / "m.tw"
        )
    yield Compiled(artifact, device_kernels(artifact.path / "model.so"))


def _source(name: str, folder: Path) -> tuple[str, str]:
    """The model and its weights: SmolLM2 with its own, where they are installed."""
    if name == "smollm2" and all(piece.installed() for piece in PACKAGED_MODELS[REAL_MODEL].pieces):
        return REAL_MODEL, "auto"
    (folder / "config.json").write_text(json.dumps(SMOLLM2 if name == "smollm2" else LLAMA_8B))
    return str(folder), "random:0"


def test_every_kernel_is_known_and_there(compiled: Compiled) -> None:
    """None is left out of what follows, none runs by its reference body, and none is in the library by another name."""
    assert {k["schedule"] for k in compiled.artifact.manifest.kernels} == SCHEDULES
    assert not [w for w in compiled.artifact.manifest.warnings if "slowly" in w]
    names = {f"{k['name']}_kernel" for k in compiled.kernels()}
    assert names == {n for n in compiled.device if n.startswith(tuple(SCHEDULES))}
    layers = compiled.artifact.manifest.model["layers"]
    for step in STEPS:
        counts = {schedule: compiled.calls(schedule, step) for schedule in SCHEDULES - {"paged_attention"}}
        # Two norms of a layer: of a small model in its linears, beside which they are called for many tokens. But the
        # last layer's second one, after attention, has wanted rows alone, of which there is one here.
        norms = 2 * layers if compiled.small else 0
        assert counts == {
            "angles": 1,
            "embedding": 1,
            "linear": 4 * layers + 1 + (norms - compiled.small if step == "step" else 0),
            "qkv_append": layers,
            "rms_norm": 2 * layers - norms + 1,
            "sample": 1,
        }


def test_linears_multiply_by_wgmma_what_tma_loads(compiled: Compiled) -> None:
    """But for few tokens and a small weight: it goes from memory into registers, and from there into mma.sync."""
    linears = compiled.kernels("linear")
    assert len(linears) >= 8, "four of a layer and the logits', for few tokens and for many; some may be the same"
    with ThreadPoolExecutor() as pool:  # a disassembler each
        for kernel, sass in zip(linears, pool.map(lambda k: compiled.code(k).sass, linears), strict=True):
            if not re.search(r"\bHG?MMA\b", sass):
                assert compiled.small and "MUFU.RSQ" in sass, "a norm before linears for many tokens"
            elif kernel["tile"].keys() == {"warps"}:
                assert kernel["max_rows"] <= 8 and "HMMA" in sass and "UTMALDG" not in sass, kernel["name"]
            else:
                assert "HGMMA" in sass and "UTMALDG" in sass, kernel["name"]
    few = [k for k in linears if k["tile"].keys() == {"warps"}]
    assert len(few) == (4 if compiled.small else 0)


def test_attention_multiplies_prompts_by_wgmma(compiled: Compiled) -> None:
    """A step of any tokens has two kernels a layer, for prompts and for generated tokens, and plans both once; a step
    of generated tokens alone has one of each, which may be picked of several."""
    layers, attention = compiled.artifact.manifest.model["layers"], compiled.kernels("paged_attention")
    planning = [k["name"] for k in attention if 1 in k["calls"].values()]
    working = {k["name"]: compiled.code(k).sass for k in attention if k["name"] not in planning}
    assert all("UTMALDG" in sass for sass in working.values()), "pages come by TMA"
    [prefill] = [name for name, sass in working.items() if "HGMMA" in sass]
    steps = {k["name"]: [step for step in STEPS if k["calls"].get(step) == layers] for k in attention}
    assert steps[prefill] == ["step"]
    for step, kinds in zip(STEPS, (2, 1), strict=True):
        assert compiled.calls("paged_attention", step) == kinds * (layers + 1), "none is overlooked"
    assert len(planning) == 3


def test_no_kernel_spills(compiled: Compiled) -> None:
    """Neither registers nor arrays in local memory, but for cosf's own table for angles above 100,000 radians."""
    spilling = [
        f"{kernel['name']}: {resources}"
        for kernel in compiled.kernels()
        if kernel["schedule"] != "angles"
        for resources in [compiled.code(kernel).resources]
        if resources["STACK"] or resources["LOCAL"]
    ]
    assert spilling == []


def test_code_is_for_hopper_alone(compiled: Compiled) -> None:
    """Cubins of the target, and no text that a driver would compile when the artifact is loaded."""
    content = (compiled.artifact.path / "model.so").read_bytes()
    assert content.count(b"-arch sm_90a") == len({k.cubin for k in compiled.device.values()})
    assert b".target sm_90a" not in content


SERVE = """
import tilewright
from tilewright import Engine, SamplingParams
model = tilewright.load({path!r}, kv_tokens=4096)
executor = model.executor
steps = []
work = executor._work
def counted(bucket, *rest):
    before = launches()
    result = work(bucket, *rest)
    steps.append((bucket.function, launches() - before))
    return result
executor._work = counted
with Engine(model) as engine:
    engine.generate([[1] * 40, [2, 3]], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    engine.check_invariants()
told["steps"], told["drawn"] = steps, engine.stats.drawn
"""


def test_it_is_served_up_to_its_launches_with_driver_and_cudart_alone(compiled: Compiled, tmp_path: Path) -> None:
    """On a stand-in for both: host code, executor and manifest agree on what is launched, and neither torch nor a
    compiler is loaded. What comes out is no text."""
    ran = run_with_stand_in(SERVE.format(path=str(compiled.artifact.path)), tmp_path)
    check(ran.modules, ran.maps)
    assert ran.told["drawn"] == 12
    plain = 12  # plain operators of a step: position tables, slots, the rows that are wanted
    manifest = compiled.artifact.manifest
    kernels = {step: sum(k["calls"].get(step, 0) for k in manifest.kernels) for step in STEPS}
    assert {function for function, _ in ran.told["steps"]} == set(STEPS)
    for function, launched in ran.told["steps"]:
        assert kernels[function] <= launched <= kernels[function] + plain, function
    assert [f for f, _ in ran.told["steps"]].count("step_decode") == 2, "once run, once captured; then it is a graph"
