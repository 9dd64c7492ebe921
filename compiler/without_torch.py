"""Imports that must not bring torch along."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Within, `import torch` fails, unless it was loaded before.

    tvm_ffi imports torch wherever it is installed. Neither compiling nor serving uses it, and it takes over a second.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
