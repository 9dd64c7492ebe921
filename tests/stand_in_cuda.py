"""Runs a script in a process whose GPU is a stand-in (stand_in_cuda.c): an artifact for a GPU, up to its launches."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.compiler.codegen.c_compiler import c_compiler

_SOURCE = Path(__file__).with_suffix(".c")

# The libraries come first and for everybody: what later asks for one of these names gets them. `launches()` is how many
# kernels were launched, in steps that are no graphs and while graphs were captured.
_BEGIN = """
import ctypes, json
from pathlib import Path
driver = ctypes.CDLL({folder!r} + "/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL({folder!r} + "/libcudart.so.13", mode=ctypes.RTLD_GLOBAL)
from tilewright.runtime.cuda import cudart
cudart._package_files = lambda: [Path({folder!r}) / "libcudart.so.13"]
launches = lambda: ctypes.c_long.in_dll(driver, "stand_in_launches").value
told = {{}}
"""
_END = """
import sys
print(json.dumps({"told": told, "modules": sorted(sys.modules), "maps": open("/proc/self/maps").read()}))
"""


@dataclass(frozen=True)
class Ran:
    """What the script put into `told`, and the process' modules and mapped files after it."""

    told: dict[str, Any]
    modules: list[str]
    maps: str


def run_with_stand_in(script: str, folder: Path) -> Ran:
    """Runs `script` in a fresh process; the libraries are built in `folder`."""
    _build(folder)
    code = _BEGIN.format(folder=str(folder)) + script + _END
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return Ran(**json.loads(result.stdout.splitlines()[-1]))


def _build(folder: Path) -> None:
    version = folder / "version.map"  # symbols are asked for by this version
    version.write_text("libcudart.so.13 { global: *; };\n")
    for name, flags in (("libcuda.so.1", ["-DDRIVER"]), ("libcudart.so.13", [f"-Wl,--version-script={version}"])):
        command = [c_compiler(), "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", *flags]
        subprocess.run([*command, "-o", str(folder / name), str(_SOURCE)], check=True)
