"""Kernels by themselves as a shared library: for what runs them outside a model."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tilewright.compiler.codegen.c_compiler import c_compiler
from tilewright.compiler.errors import TargetError


def link_kernels(objects: Sequence[Path], library: Path) -> None:
    """Links object files as a model's are. Raises TargetError where the C compiler fails."""
    command = [c_compiler(), "-shared", "-o", str(library), *map(str, objects), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise TargetError(f"{command[0]} could not link kernels: {result.stderr.strip().splitlines()[-1]}")
