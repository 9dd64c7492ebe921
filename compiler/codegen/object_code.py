"""The object file of a module that LLVM compiled."""

import os
from typing import Any


def object_code(mod: Any) -> bytes:
    """Its bytes, by way of a file in memory: LLVM ends the process where a disk is full."""
    memory = os.memfd_create("kernel.o")
    with open(memory, "rb") as stream:
        mod.write_to_file(f"/proc/self/fd/{memory}", "o")
        return stream.read()
