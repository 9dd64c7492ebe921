"""Random weights in the shape of a model, for measuring and testing without the real ones."""

import dataclasses
import hashlib

import numpy as np

from tilewright.compiler.checkpoint import Checkpoint, LazyTensor, ModelConfig
from tilewright.compiler.parameters import parameter_shapes

_DEVIATION = 0.02  # of weights and biases, as models are initialised; keeps activations near 1 at any depth
_NORM_DEVIATION = 0.1  # of norm weights around 1


def random_checkpoint(model: ModelConfig | Checkpoint, seed: int) -> Checkpoint:
    """`model` with a normally distributed float32 weight for each parameter; tokenizer and name stay.

    Each weight has a generator of its own, keyed by its name and `seed`: it does not depend on which others are read.
    """
    config = model if isinstance(model, ModelConfig) else model.config
    tensors = {name: _random_tensor(name, shape, seed) for name, shape in parameter_shapes(config).items()}
    source = {"kind": "random", "seed": str(seed)}
    if isinstance(model, Checkpoint):
        return dataclasses.replace(model, tensors=tensors, source={**source, "config": model.source["kind"]})
    return Checkpoint(f"{config.family}-random", config, tensors, None, source)


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> LazyTensor:
    def read() -> np.ndarray:
        key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
        values = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            return np.float32(1) + np.float32(_NORM_DEVIATION) * values
        return np.float32(_DEVIATION) * values

    return LazyTensor(shape=shape, format="f32", read=read, read_raw=read)
