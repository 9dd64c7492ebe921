"""Runs a module of any stage up to "fused" on the CPU: TVM's own lowering, no kernels of ours."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tilewright.compiler.checkpoint import Checkpoint, LazyTensor

# What is compiled here runs a few times on little: LLVM's optimiser would take most of the time.
TARGET = {"kind": "llvm", "mcpu": "x86-64-v3", "opt-level": 0}


def compile_module(mod: tvm.IRModule) -> Callable[..., Any]:
    """`forward` of `mod`: numpy arrays or TVM tensors in, a numpy array or a list of them out."""
    target = tvm.target.Target(TARGET)
    with target:
        executable = tvm.compile(mod, target, relax_pipeline=relax.get_default_pipeline(target))
    forward = relax.VirtualMachine(executable, tvm.cpu())["forward"]

    def run(*arrays: Any) -> Any:
        return _to_numpy(forward(*(_to_tensor(a) for a in arrays)))

    return run


def read_params(mod: tvm.IRModule, tensors: Mapping[str, LazyTensor]) -> list[np.ndarray]:
    """The float32 parameters of `forward`, in order: each the concatenation of its sources' rows."""
    params = []
    for entry in json.loads(str(mod["forward"].attrs["tw.params"])):
        array = np.concatenate([tensors[source].read() for source in entry["sources"]])
        assert list(array.shape) == entry["shape"], entry["name"]
        params.append(array)
    return params


class ReferenceModel:
    """A compiled module with the weights of a checkpoint: call it with tokens."""

    def __init__(self, mod: tvm.IRModule, checkpoint: Checkpoint) -> None:
        self.forward = compile_module(mod)
        self.params = [_to_tensor(p) for p in read_params(mod, checkpoint.tensors)]  # copied once, not at each call

    def __call__(self, tokens: Sequence[int]) -> Any:
        """tokens -> float32[n, vocab], or a list of results where the module has taps."""
        return self.forward(np.array(tokens, np.int32), *self.params)


def run_model(mod: tvm.IRModule, tokens: Sequence[int], checkpoint: Checkpoint) -> Any:
    """float32[n, vocab] of `tokens`, or a list of results where the module has taps. Compiles anew at each call."""
    return ReferenceModel(mod, checkpoint)(tokens)


def _to_tensor(value: Any) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def _to_numpy(value: Any) -> Any:
    return value.numpy() if hasattr(value, "numpy") else [_to_numpy(item) for item in value]
