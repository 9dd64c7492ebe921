"""The targets: every record by name, and the one that a name on the command line means.

A new target is one frozen record in cpu.py or cuda.py. No other code compares names.
"""

from difflib import get_close_matches

from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import cpu, cuda
from tilewright.compiler.targets.base import Target

RECORDS: dict[str, Target] = {record.name: record for record in (*cpu.RECORDS, *cuda.RECORDS)}

# Names that stand for the machine at hand.
_HERE = {"cpu": cpu.this_machine, "cuda": cuda.this_machine}

# Kinds with a code generator; a record of another kind can be named but not compiled for.
COMPILED_KINDS = ("cpu",)


def find_target(name: str) -> Target:
    """The record that `name` means: a record's own name, or "cpu", "cuda" for the machine at hand; "auto" is "cpu".

    Raises TargetError for an unknown name, with the nearest ones, and for hardware that is not here.
    """
    name = "cpu" if name == "auto" else name
    if name in _HERE:
        return _HERE[name]()
    if name in RECORDS:
        return RECORDS[name]
    known = ["auto", *_HERE, *RECORDS]
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise TargetError(f"unknown target {name!r}; {hint}")


def resolve_target(name: str = "auto") -> Target:
    """As `find_target`, for compiling: TargetError too where there is no code generator for the record's kind."""
    target = find_target(name)
    if target.kind not in COMPILED_KINDS:
        raise TargetError(
            f"compiling for {target.name} is not possible yet: this version has no {target.kind.upper()} code generator;"
            " use a CPU target such as cpu"
        )
    return target
