"""TVM's target for one of our targets."""

from typing import Any

from tilewright.compiler.targets import host
from tilewright.compiler.targets.base import Target

# The host's part of a CUDA program launches kernels and computes extents: any machine of the architecture runs it.
_HOST_LEVEL = {"x86_64": "x86-64-v2"}


# Passes of TVM's that find nothing to do in our kernels, which allocate what they need and no more, and have no thread,
# no shared memory, no guarded and no empty loops. Shrinking buffers takes 20 of a large kernel's 22 seconds, the rest a
# third of what is left. tests/test_kernel_passes.py holds what is compiled without them to the same bytes.
NOTHING_TO_DO = (
    "s_tir.CompactBufferAllocation",
    "s_tir.HoistIfThenElse",
    "s_tir.InsertHoistIfThenElse",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectSoftwarePipeline",
    "s_tir.InjectVirtualThread",
    "s_tir.LoopPartition",
    "s_tir.RenormalizeSplitPattern",
    "s_tir.ThreadSync",
    "tirx.RemoveNoOp",
)


def build_llvm(mod: Any, machine: Any) -> Any:
    """A module of kernels for a CPU, as TVM compiles it."""
    import tvm

    with tvm.transform.PassContext(disabled_pass=list(NOTHING_TO_DO)):
        return tvm.compile(mod, machine)


def llvm_target(target: Target) -> Any:
    """The LLVM target: always a named CPU level and features, since "native" aborts TVM and may be reported wrongly."""
    import tvm

    options: dict[str, Any] = {"kind": "llvm"}
    if target.mcpu:
        options["mcpu"] = target.mcpu
    if target.mattr:
        options["mattr"] = list(target.mattr)
    return tvm.target.Target(options)


def cuda_target(target: Target) -> Any:
    """The CUDA target, whose host is the lowest level of this machine's architecture that GPU machines have."""
    import tvm

    level = {"kind": "llvm", "mcpu": _HOST_LEVEL.get(host.arch(), "generic")}
    device: dict[str, Any] = {"kind": "cuda", "arch": target.arch}
    if target.shared_memory_bytes:
        device["max_shared_memory_per_block"] = target.shared_memory_bytes
    return tvm.target.Target(device, host=level)
