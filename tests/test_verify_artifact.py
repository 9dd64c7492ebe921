"""`verify`: the compiled layers against the plain model in numpy, with the artifact's own weights."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import relax as R

from tests.checkpoints import make_checkpoint
from tests.reference import ReferenceModel
from tests.tolerances import assert_close
from tilewright.compiler.artifact import LIBRARY, PARAMS, Artifact, Manifest, seal
from tilewright.compiler.errors import CompileError
from tilewright.compiler.frontends import load_checkpoint
from tilewright.compiler.numpy_evaluator import evaluate
from tilewright.compiler.verify_artifact import read_config, verify
from tilewright.models.registry import build_model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("verify"), "gemma3")


@pytest.fixture(scope="module")
def artifact(source, compile_tiny) -> Artifact:
    return Artifact.open(compile_tiny(source))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_numpy_says_what_the_compiled_plain_model_says(tmp_path, family):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, family))
    mod = build_model(checkpoint.config, taps=True)
    tokens = np.random.default_rng().integers(0, checkpoint.config.vocab, 21).tolist()
    entries = {v.name: v.name for v in mod["forward"].params[1:]}
    reference = ReferenceModel(mod, checkpoint)
    weights = dict(zip(entries, (p.numpy() for p in reference.params), strict=True))
    for ours, theirs in zip(evaluate(mod, tokens, weights.__getitem__), reference(tokens), strict=True):
        assert_close(ours, theirs)


def test_every_layer_of_a_good_artifact_is_close(artifact):
    checks = verify(artifact)
    assert [c.name for c in checks[-2:]] == [f"layer {artifact.manifest.model['layers'] - 1}", "logits"]
    assert all(c.error <= c.allowed for c in checks), checks


def test_a_wrong_weight_shows_in_its_layer(artifact, tmp_path):
    """The kernels read one weight, the reference another: from that layer on, the check must fail."""
    victim = next(i for i, p in enumerate(artifact.manifest.params) if p.sources[0].startswith("layers.1.mlp.down"))
    honest = Artifact.map_params

    def tampered(self):
        arrays = honest(self)
        if tampered.calls:  # the model maps first, the reference second
            arrays[victim][...] = 0
        tampered.calls += 1
        return arrays

    tampered.calls = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Artifact, "map_params", tampered)
        checks = verify(artifact)
    assert checks[0].error <= checks[0].allowed
    assert checks[1].error > checks[1].allowed


def test_the_configuration_survives_the_manifest(artifact, source):
    assert read_config(artifact.manifest.model) == load_checkpoint(source).config


def test_an_operator_that_numpy_does_not_know_is_named():
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    tokens = relax.Var("tokens", R.Tensor((n,), "int32"))
    with builder.function("forward", [tokens], attrs={"num_input": 1}):
        with builder.dataflow():
            out = builder.emit_output(relax.op.erf(builder.emit(relax.op.astype(tokens, "float32"))))
        builder.emit_func_output(out)
    with pytest.raises(CompileError, match="lacks operator erf"):
        evaluate(builder.get(), [1, 2], lambda name: np.zeros(0))


def test_a_sealed_manifest_reads_back(artifact, tmp_path):
    """What `seal` writes is what `open` reads."""
    (tmp_path / PARAMS).parent.mkdir(parents=True)
    (tmp_path / PARAMS).write_bytes(b"x" * 100)
    (tmp_path / LIBRARY).write_bytes(b"x" * 10)
    written = seal(tmp_path, dataclasses.replace(artifact.manifest, files={}))
    assert isinstance(written, Manifest)
    assert Artifact.open(tmp_path).manifest == written
