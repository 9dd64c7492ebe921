"""An artifact against the reference, layer by layer: its own weights, unpacked, through the plain model in numpy."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tilewright.compiler.artifact import Artifact, Param
from tilewright.compiler.checkpoint import DENSE_FORMATS, ModelConfig, Rope
from tilewright.compiler.relax_utils import main_function, param_entries, weight_params

TOKENS = 48
# Relative to the norm of the reference. A layer's error is what the kernels add from the embedding up to there: sums in
# another order for dense weights, and for block formats the rounding of activations: to 16 bits, which gives some 1e-4,
# and in gate and up to 8, which gives up to 1.3e-2 in small random models and 1e-2 in SmolLM2-135M: three times that.
ALLOWED = {"dense": 1e-4, "block": 4e-2}


@dataclass(frozen=True)
class LayerCheck:
    """How far one layer's output is off: |actual - reference| / |reference|, over all tokens."""

    name: str
    error: float
    allowed: float


def verify(artifact: Artifact, seed: int = 0) -> list[LayerCheck]:
    """Every layer's output and the logits for TOKENS random tokens. What the artifact runs is what serving runs."""
    from tilewright.compiler.numpy_evaluator import evaluate
    from tilewright.models.registry import build_model
    from tilewright.runtime.model import Model

    config = read_config(artifact.manifest.model)
    tokens = np.random.default_rng(seed).integers(0, config.vocab, TOKENS).tolist()
    actual = Model(artifact, kv_tokens=artifact.manifest.limits["page_size"]).layers(tokens)
    mod = build_model(config, taps=True)
    reference = evaluate(mod, tokens, partial(_weight, _sources(mod), _Unpacked(artifact)))
    dense = all(p.columns is None or p.format in DENSE_FORMATS for p in artifact.manifest.params)
    allowed = ALLOWED["dense" if dense else "block"]
    names = ["logits", *(f"layer {i}" for i in range(config.layers))]
    checks = [LayerCheck(n, _error(a, r), allowed) for n, a, r in zip(names, actual, reference, strict=True)]
    return [*checks[1:], checks[0]]


def read_config(fields: Any) -> ModelConfig:
    """ModelConfig back from the manifest's JSON."""
    known = dict(fields)
    for name in ("rope", "window_rope"):
        if known[name] is not None:
            scaling = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in known[name]["scaling"])
            known[name] = Rope(known[name]["theta"], scaling)
    known["window_layers"] = tuple(known["window_layers"])
    return ModelConfig(**known)


def _sources(mod: Any) -> dict[str, str]:
    """Relax name of each parameter of the plain model -> checkpoint tensor."""
    _, func = main_function(mod)
    return {v.name: e["sources"][0] for v, e in zip(weight_params(func), param_entries(func), strict=True)}


def _weight(sources: dict[str, str], weights: "_Unpacked", name: str) -> np.ndarray:
    return weights[sources[name]]


class _Unpacked:
    """Checkpoint tensors as float32, out of the packed parameters that hold their rows."""

    def __init__(self, artifact: Artifact):
        from tilewright.compiler.parameters import parameter_shapes

        self._packed = artifact.map_params()
        shapes = parameter_shapes(read_config(artifact.manifest.model))
        self._places: dict[str, tuple[int, Param, int, int]] = {}
        for i, param in enumerate(artifact.manifest.params):
            start = 0
            for source in param.sources:
                self._places[source] = (i, param, start, start + shapes[source][0])
                start += shapes[source][0]

    def __getitem__(self, source: str) -> np.ndarray:
        from tilewright.models.quant import FORMATS

        index, param, start, end = self._places[source]
        if param.columns is None:
            return self._packed[index][start:end]
        return FORMATS[param.format].unpack(self._packed[index], param.rows, param.columns)[start:end]


def _error(actual: np.ndarray, reference: np.ndarray) -> float:
    difference = np.linalg.norm(actual.astype(np.float64) - reference)
    return float(difference / max(float(np.linalg.norm(reference)), 1e-30))
