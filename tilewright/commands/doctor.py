"""`tilewright doctor`: what this machine can compile for and run, and what it lacks."""

from typing import Annotated

import typer


def command(
    measure: Annotated[bool, typer.Option("--measure", help="Time the memory too (a few seconds).")] = False,
) -> None:
    """Say what this machine can compile for and run, and what is missing."""
    from tilewright import console, diagnosis

    machine = console.table("Machine", "", "")
    for name, value in diagnosis.machine(measure).items():
        machine.add_row(name, value)

    checks = console.table("Found", "what", "found", "missing")
    for check in diagnosis.checks():
        checks.add_row(check.name, check.found, "" if check.ok else check.remedy)

    targets = console.table("Targets", "target", "compile", "run")
    for ability in diagnosis.abilities():
        targets.add_row(ability.target, _answer(ability.compile_obstacle), _answer(ability.run_obstacle))
    console.show(machine, checks, targets)


def _answer(obstacle: str) -> str:
    return f"no: {obstacle}" if obstacle else "yes"
