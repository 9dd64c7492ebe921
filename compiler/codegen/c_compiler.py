"""The C compiler of this machine, which only links."""

import shutil

from tilewright.compiler.errors import TargetError


def c_compiler() -> str:
    """Its name on PATH. Raises TargetError where there is none."""
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return name
    raise TargetError("no C compiler (cc, gcc or clang) is on PATH to link the model with; install one")
