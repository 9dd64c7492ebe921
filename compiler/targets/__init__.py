"""The targets: every record by name, and the one that a name on the command line means.

A new target is one frozen record in cpu.py or cuda.py. No other code compares names.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import cpu, cuda, host, measured
from tilewright.compiler.targets.base import Target
from tilewright.compiler.targets.measured import Measured

RECORDS: dict[str, Target] = {record.name: record for record in (*cpu.RECORDS, *cuda.RECORDS)}

# Names that stand for the machine at hand.
_HERE = {"cpu": cpu.this_machine, "cuda": cuda.this_machine}


def find_target(name: str) -> Target:
    """The record that `name` means: a record's own name, or "cpu", "cuda" for the machine at hand; "auto" is "cpu".

    Raises TargetError for an unknown name, with the nearest ones, and for hardware that is not here.
    """
    name = "cpu" if name == "auto" else name
    if name in _HERE:
        return _HERE[name]()
    if name in RECORDS:
        return RECORDS[name]
    refusal = cuda.refusal(name)
    if refusal:
        raise TargetError(refusal)
    known = ["auto", *_HERE, *RECORDS]
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise TargetError(f"unknown target {name!r}; {hint}")


def resolve_target(name: str = "auto") -> Target:
    """As `find_target`, for compiling: the machine at hand with the ceilings that were measured on it.

    Raises TargetError too where no code for the record can be generated here, or the measured figures are damaged.
    """
    target = find_target(name)
    obstacle = compile_obstacle(target)
    if obstacle:
        raise TargetError(f"compiling for {target.name} is not possible: {obstacle}")
    found = measured_here(target)
    return found.of(target) if found and name in ("auto", *_HERE) else target


def target_of(about: Mapping[str, Any]) -> Target:
    """The target of an artifact, as its manifest tells it: a record, or what a CPU was compiled for as "cpu"."""
    if about["name"] in RECORDS:
        return RECORDS[about["name"]]
    return Target(about["name"], about["kind"], about["arch"], tuple(about["features"]))


def measured_here(target: Target) -> Measured | None:
    """What was measured on this machine's device of the target's kind; None where nothing was, or where code for the
    target does not run on it. Raises TargetError where the figures are damaged."""
    if run_obstacle(target):
        return None
    device = device_name(target.kind)
    return measured.read(device) if device else None


def device_name(kind: str) -> str | None:
    """What figures of this machine's processor, or of its first GPU, are kept under; None without a GPU."""
    if kind == "cpu":
        return f"{host.processor()}, {host.cores()} cores"
    driver = cuda.find_driver()
    return driver.devices[0].name if driver and driver.devices else None


def compile_obstacle(target: Target) -> str | None:
    """Why no code for `target` can be generated here, and what to do; None where it can."""
    if target.kind == "cuda":
        return _toolchain_obstacle()
    if target.arch != host.arch():
        return f"linking for {target.arch} needs a machine of that architecture, this one is {host.arch()}"
    return None


def run_obstacle(target: Target) -> str | None:
    """Why an artifact for `target` would be refused here; None where it would run."""
    if target.kind == "cuda":
        return cuda.run_obstacle(target)
    if target.arch != host.arch():
        return f"this machine is {host.arch()}"
    absent = host.missing(target.features)
    return f"this processor lacks {', '.join(absent)}" if absent else None


def _toolchain_obstacle() -> str | None:
    from tilewright.compiler.codegen.cuda_toolchain import find_toolchain

    try:
        find_toolchain()
    except TargetError as error:
        return str(error)
    return None
