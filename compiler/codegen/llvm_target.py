"""TVM's target for one of our CPU targets."""

from typing import Any

from tilewright.compiler.targets.base import Target


def llvm_target(target: Target) -> Any:
    """The LLVM target: always a named CPU level and features, since "native" aborts TVM and may be reported wrongly."""
    import tvm

    options: dict[str, Any] = {"kind": "llvm"}
    if target.mcpu:
        options["mcpu"] = target.mcpu
    if target.mattr:
        options["mattr"] = list(target.mattr)
    return tvm.target.Target(options)
