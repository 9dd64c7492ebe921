"""Kernels compiled ahead, and bound to tensors: compile on any machine, carry one file to the GPU's."""

import dataclasses
import pickle
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.cuda_runner import CudaRunner, cuda_target, load_kernels
from tests.kernel_runner import lower
from tilewright.compiler import env
from tilewright.compiler.codegen.cuda_module import CudaKernel
from tilewright.schedules.base import Call, Lowering, Output, Schedule
from tilewright.schedules.records import Known, known_here

Launch = Callable[[], None]


@dataclass
class Compiled:
    """The kernels of one lowering. calls: how they are called; the functions themselves are left out."""

    calls: Lowering
    kernels: dict[str, CudaKernel]
    functions: list[Any] = field(default_factory=list)

    def load(self) -> "Compiled":
        self.functions = load_kernels(self.kernels)
        return self

    def bind(self, arguments: tuple[Any, ...], m: int, made: MutableMapping[str, Any]) -> tuple[Launch, Launch]:
        """Two functions that enqueue kernels on torch's current stream: those that a step runs once, and the others.

        Outputs are taken from `made` where they are there, so that calls share them, and put there.
        """
        import tvm_ffi

        shared, own = [], []
        for call, function in zip(self.calls.kernels, self.functions, strict=True):
            for output in call.outputs:
                if output.name not in made:
                    made[output.name] = _poisoned(output, m)
            given = [arguments[i] if isinstance(i, int) else made[i] for i in call.inputs]
            given += [made[output.name] for output in call.outputs]
            values = [a if isinstance(a, int | float) else tvm_ffi.from_dlpack(a) for a in given]
            (shared if call.shared else own).append((function, values, given))
        return _launch(shared), _launch(own)


def _launch(calls: list[tuple[Any, list[Any], list[Any]]]) -> Launch:
    import tvm_ffi

    def launch() -> None:
        with tvm_ffi.use_torch_stream():
            for function, values, _ in calls:
                function(*values)

    return launch


def _poisoned(output: Output, m: int) -> Any:
    """A new tensor that no kernel has written: NaN, or a large negative integer."""
    import torch

    shape = tuple(m if d == "m" else int(d) for d in output.shape)
    dtype = getattr(torch, output.dtype)
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 2 + 1
    return torch.full(shape, value, dtype=dtype, device="cuda")


@cache
def _known() -> Known:
    return known_here(env.tuning_logs(), cuda_target())


def lowered(schedule: Schedule, call: Call) -> Lowering:
    """As a compile would: with the best tile that records know."""
    facts = schedule.match(call, cuda_target())
    best = _known().best(schedule.name, facts, call.rows, schedule.space(facts, cuda_target()))
    return lower(schedule, call, cuda_target(), best[0] if best else None)


def compiled(lowering: Lowering) -> Compiled:
    """Compiles; needs no GPU."""
    kernels = CudaRunner(lowering).kernels
    calls = tuple(dataclasses.replace(kernel, func=None) for kernel in lowering.kernels)
    return Compiled(dataclasses.replace(lowering, kernels=calls), kernels)


def compile_all(names: list[str], make: Callable[[str], Compiled]) -> dict[str, Compiled]:
    """What `make` returns of each name, in as many processes as compile kernels at a time."""
    with ProcessPoolExecutor(env.jobs()) as pool:
        found = {}
        for name, one in zip(names, pool.map(make, names), strict=True):
            found[name] = one
            print(f"compiled: {len(found)} of {len(names)}, {name}", flush=True)
    return found


def write(file: Path, kernels: Mapping[str, Compiled]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(dict(kernels)))


def read(file: Path) -> dict[str, Compiled]:
    """By case. Raises SystemExit where there is no such file."""
    if not file.exists():
        raise SystemExit(f"{file} does not exist; make it with --prepare {file}")
    return pickle.loads(file.read_bytes())


def load_all(kernels: Mapping[str, Compiled]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(Compiled.load, kernels.values()))
