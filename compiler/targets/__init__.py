"""The targets: every record by name, and the one that a name on the command line means.

A new target is one frozen record in cpu.py or cuda.py. No other code compares names.
"""

from difflib import get_close_matches

from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import cpu, cuda, host
from tilewright.compiler.targets.base import Target

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
    """As `find_target`, for compiling: TargetError too where no code for the record can be generated here."""
    target = find_target(name)
    obstacle = compile_obstacle(target)
    if obstacle:
        raise TargetError(f"compiling for {target.name} is not possible: {obstacle}")
    return target


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
