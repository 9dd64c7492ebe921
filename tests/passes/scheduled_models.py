"""Small models lowered to kernels, built as an artifact's program is, and run beside what they came from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tests.kernel_runner import host_target
from tests.passes.served_models import Batch, Tiny, fused_model
from tilewright.compiler.codegen.kernels import compile_kernels
from tilewright.compiler.codegen.program import build_program, link
from tilewright.compiler.describe import split_kernels
from tilewright.compiler.relax_utils import param_entries
from tilewright.passes.fuse_linear_neighbours import FuseLinearNeighbours
from tilewright.passes.fuse_qkv_append import FuseQKVAppend
from tilewright.passes.insert_paged_kv import InsertPagedKV
from tilewright.passes.lower_sampling import LowerSampling
from tilewright.passes.quantize_weights import QuantizeWeights

ALTERNATIVES = 5


def served_model(c: Tiny, page_size: int = 16, weight_format: str = "f32", activation_bits: int = 16) -> tvm.IRModule:
    """A model of stage "served", before its buckets are planned, with every matrix in one format."""
    mod = fused_model(c)
    sources = [s for e in param_entries(mod["forward"]) if len(e["shape"]) == 2 for s in e["sources"]]
    passes = (
        InsertPagedKV(page_size=page_size, k_transposed=True),
        QuantizeWeights(
            formats=tuple((s, weight_format) for s in sources), narrow=tuple(sources) if activation_bits == 8 else ()
        ),
        FuseQKVAppend(),
        FuseLinearNeighbours(),
        LowerSampling(top_logprobs=ALTERNATIVES),
    )
    for p in passes:
        mod = p.run(mod)
    return mod


def kernel_names(mod: tvm.IRModule) -> list[str]:
    """The kernels that ApplySchedules left in a module, sorted."""
    return sorted(g.name_hint for g, f in mod.functions.items() if "tw.kernel" in (f.attrs or {}))


class Built:
    """A scheduled module as code for this machine. Called as `served_models.Compiled` is."""

    def __init__(self, mod: tvm.IRModule, folder: Path) -> None:
        target = host_target()
        program, kernels = split_kernels(mod)
        objects = compile_kernels(kernels, target, folder)
        executable, self.workspace = build_program(program, target)
        link(executable, objects.values(), folder / "model.so")
        self.vm = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(folder / "model.so")), tvm.cpu())
        entries = ((str(g.name_hint), f.attrs or {}) for g, f in program.functions.items())
        self.inputs = {name: int(attrs["num_input"]) for name, attrs in entries if "num_input" in attrs}

    def __call__(self, name: str, *args: Any) -> Any:
        values = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in args]
        count = self.inputs[name]
        result = self.vm[name](*values[:count], tuple(values[count:]))
        return result.numpy() if hasattr(result, "numpy") else [r.numpy() for r in result]


class BuiltBatch(Batch):
    """Sequences over a page pool, stepped by kernels."""

    def __init__(self, mod: tvm.IRModule, folder: Path, params: Sequence[np.ndarray], page_size: int = 16) -> None:
        built = Built(mod, folder)
        super().__init__(mod, list(params), page_size, compiled=built)
