"""Serving on a GPU takes the driver and CUDA's runtime library: no torch, no compiler, no toolkit, in fresh processes.

torch and triton are installed where the tests run, so whatever would import them finds them.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from tests.runtime.toy_program import answer, toy_artifact

FORBIDDEN_MODULES = ("tvm", "torch", "triton", "transformers", "nvidia", "cuda", "cupy", "rich", "typer")
# Parts of mapped files' names. libcudart and libcuda are what there may be.
FORBIDDEN_MAPS = (
    "libtvm_compiler",
    "libtvm.so",
    "libtorch",
    "libtriton",
    "libnvrtc",
    "libnvvm",
    "libcublas",
    "libcudnn",
)

LOOK = """
import json, sys
print(json.dumps({"modules": sorted(sys.modules), "maps": open("/proc/self/maps").read()}))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def look_after(script: str) -> tuple[list[str], str]:
    """Modules and mapped files of a fresh process that has run the script, which prints nothing."""
    result = subprocess.run([sys.executable, "-c", script + LOOK], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    return found["modules"], found["maps"]


@cache
def bare() -> tuple[list[str], str]:
    """What the interpreter itself has loaded here, before it runs anything."""
    return look_after("")


@cache
def optional() -> set[str]:
    """NVIDIA's bindings, where they happen to be installed: tvm_ffi itself takes them then, and does without."""
    return {"cuda"} & set(look_after("import tvm_ffi\n")[0])


def check(modules: Iterable[str], maps: str) -> None:
    loaded = {name.partition(".")[0] for name in set(modules) - set(bare()[0])}
    assert sorted(loaded & set(FORBIDDEN_MODULES) - optional()) == []
    mapped = [line.split()[-1] for line in maps.splitlines() if any(part in line for part in FORBIDDEN_MAPS)]
    assert [file for file in sorted(set(mapped)) if file not in bare()[1]] == []


def test_no_module_of_it_loads_a_compiler() -> None:
    folder = Path(__file__).parents[2] / "runtime" / "cuda"
    names = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    assert {"executor", "cudart", "graphs", "machine", "weights"} <= set(names)
    imports = "".join(f"import tilewright.runtime.cuda.{name}\n" for name in names)
    modules, maps = look_after(imports)
    assert {f"tilewright.runtime.cuda.{name}" for name in names} <= set(modules)
    check(modules, maps)


def test_tvms_runtime_brings_no_compiler_along() -> None:
    """All that is loaded before the GPU is asked for anything; and a machine without one is refused first."""
    modules, maps = look_after(
        """
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import RECORDS, run_obstacle
from tilewright.runtime.cuda.executor import CudaExecutor
from tilewright.runtime.library import load_runtime
load_runtime()
run_obstacle(RECORDS["nvidia-h100"])
"""
    )
    assert "tvm_ffi" in modules and "libtvm_runtime" in maps
    check(modules, maps)


@pytest.mark.gpu
def test_serving_on_a_gpu_takes_driver_and_cudart_alone(tmp_path: Path) -> None:
    import tvm

    toy_artifact(tmp_path / "toy.tw", tvm.target.Target({"kind": "cuda", "arch": "sm_90"}, host="llvm"))
    prompt = [3, 1, 4]
    modules, maps = look_after(
        f"""
from tilewright import Engine, SamplingParams, load
with Engine(load({str(tmp_path / "toy.tw")!r}, kv_tokens=1024)) as engine:
    [completion] = engine.generate([{prompt}], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
assert list(completion.token_ids) == {answer(prompt, 9)}, completion
"""
    )
    assert "libcudart" in maps and "libcuda.so" in maps
    check(modules, maps)
