"""Compile a Lowering for this machine and run it on numpy arrays: what every schedule's test needs.

run = KernelRunner(lowering)
q, pages = run(qkv, cos, sin, pages, slots, layer)
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import tvm
from tvm import tirx
from tvm.target import Target as TVMTarget

from tilewright.compiler.codegen.llvm_target import build_llvm
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, KernelCall, Lowering, Output, Reject, Schedule

ALIGN_BYTES = 64


@cache
def host_target() -> Target:
    """A record for the machine the tests run on, from the flags its operating system reports."""
    flags = _host_flags()
    found = tuple(f for f in ("avx2", "fma", "f16c") if f in flags)
    found += ("avx512",) if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags else ()
    found += ("avx512vnni",) if "avx512_vnni" in flags else ()
    found += ("amx_int8",) if "amx_int8" in flags else ()
    mcpu = "x86-64-v4" if "avx512" in found else "x86-64-v3" if "avx2" in found else "x86-64"
    mattr = tuple("+" + {"amx_int8": "amx-int8"}.get(f, f) for f in found if f in ("avx512vnni", "amx_int8"))
    return Target("test-host", "cpu", "x86_64", found, mcpu, mattr)


def _host_flags() -> set[str]:
    match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(match.group(1).split()) if match else set()


def lower(schedule: Schedule, call: Call, target: Target | None = None, tile: object = None) -> Lowering:
    """Match, take `tile` or the default one, apply. Raises AssertionError with the reason of a rejection."""
    target = target or host_target()
    facts = schedule.match(call, target)
    assert not isinstance(facts, Reject), facts.reason
    return schedule.apply(facts, schedule.space(facts, target)[0] if tile is None else tile, target)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy of `array` whose first byte lies on a 64-byte boundary, as all buffers of an artifact do."""
    result = aligned_empty(array.shape, array.dtype)
    result[...] = array
    return result


def aligned_empty(shape: Sequence[int], dtype: np.dtype | str) -> np.ndarray:
    """Uninitialised memory on a 64-byte boundary; poisoned with NaN (or a large negative integer)."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.empty(count * dtype.itemsize + ALIGN_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGN_BYTES
    result = raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)
    result.fill(np.nan if dtype.kind == "f" else np.iinfo(dtype).max // 2 + 1)
    return result


class KernelRunner:
    """The compiled kernels of one lowering. Call it with the composite's arguments (numpy arrays, int for scalars).

    Aligned arrays are passed without a copy, so `pages` and the like are updated in place; others are copied in (and
    back, where the composite updates them). `m` is the first array's leading extent unless given.
    """

    def __init__(self, lowering: Lowering, target: Target | None = None) -> None:
        self.lowering = lowering
        target = target or host_target()
        module = tvm.IRModule({_symbol(k): k.func for k in lowering.kernels})
        config = {"kind": "llvm", "mcpu": target.mcpu, "mattr": list(target.mattr)}
        self.library = build_llvm(module, TVMTarget(config))
        self.functions = [self.library[_symbol(k)] for k in lowering.kernels]

    def __call__(self, *arguments: np.ndarray | int, m: int | None = None) -> tuple[np.ndarray, ...]:
        held = [a if isinstance(a, int) else _in_place(a) for a in arguments]
        m = next(a.shape[0] for a in held if isinstance(a, np.ndarray)) if m is None else m
        made: dict[str, np.ndarray] = {}
        for kernel, function in zip(self.lowering.kernels, self.functions, strict=True):
            outputs = {o.name: aligned_empty(_shape(o, m), o.dtype) for o in kernel.outputs}
            made |= outputs
            inputs = [held[i] if isinstance(i, int) else made[i] for i in kernel.inputs]
            function(*map(_tensor, [*inputs, *outputs.values()]))
        for result in self.lowering.results:
            if isinstance(result, int) and held[result] is not arguments[result]:
                arguments[result][...] = held[result]
        return tuple(arguments[r] if isinstance(r, int) else made[r] for r in self.lowering.results)


def bind_arguments(run: KernelRunner, arguments: Sequence[np.ndarray | int], m: int | None = None):
    """A function of no arguments that launches the kernels on fixed, aligned memory: for timing."""
    held = [a if isinstance(a, int) else aligned(a) for a in arguments]
    m = next(a.shape[0] for a in held if isinstance(a, np.ndarray)) if m is None else m
    made: dict[str, np.ndarray] = {}
    launches = []
    for kernel, function in zip(run.lowering.kernels, run.functions, strict=True):
        made |= {o.name: aligned_empty(_shape(o, m), o.dtype) for o in kernel.outputs}
        inputs = [held[i] if isinstance(i, int) else made[i] for i in kernel.inputs]
        launches.append((function, [_tensor(a) for a in [*inputs, *(made[o.name] for o in kernel.outputs)]]))

    def launch() -> None:
        for function, values in launches:
            function(*values)

    return launch


def _symbol(kernel: KernelCall) -> str:
    assert isinstance(kernel.func, tirx.PrimFunc), type(kernel.func)
    return str(kernel.func.attrs["global_symbol"])


def _shape(output: Output, m: int) -> tuple[int, ...]:
    return tuple(m if d == "m" else int(d) for d in output.shape)


def _in_place(array: np.ndarray) -> np.ndarray:
    usable = array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGN_BYTES == 0
    return array if usable else aligned(array)


def _tensor(value: np.ndarray | int):
    if isinstance(value, int):
        return value
    if value.size == 0:  # numpy gives an empty array any address
        return tvm.runtime.empty(value.shape, str(value.dtype))
    return tvm.runtime.from_dlpack(value)
