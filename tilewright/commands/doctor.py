"""`tilewright doctor`: what this machine can compile for and run, what it lacks, and what it delivers."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tilewright.measure import Figures


def command(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure memory and matrix units, and keep the figures (seconds).")
    ] = False,
) -> None:
    """Say what this machine can compile for and run, and what is missing."""
    from tilewright import console, diagnosis

    figures, failure = diagnosis.measure() if measure else ([], None)

    machine = console.table("Machine", "", "")
    for name, value in diagnosis.machine().items():
        machine.add_row(name, value)

    checks = console.table("Found", "what", "found", "missing")
    for check in diagnosis.checks():
        checks.add_row(check.name, check.found, "" if check.ok else check.remedy)

    targets = console.table("Targets", "target", "compile", "run")
    for ability in diagnosis.abilities():
        targets.add_row(ability.target, _answer(ability.compile_obstacle), _answer(ability.run_obstacle))
    console.show(machine, checks, targets, *([_figures_table(figures)] if figures else []))
    if failure is not None:
        raise failure


def _answer(obstacle: str) -> str:
    """The reason alone: what to do stands beside what is missing."""
    return f"no: {obstacle.partition(';')[0]}" if obstacle else "yes"


def _figures_table(figures: "list[Figures]") -> "Table":
    """What was measured, beside what the target's record says."""
    from tilewright import console

    table = console.table("Measured", "device", "what", "here", "the record's", numeric=("here", "the record's"))
    for each in figures:
        found, record = each.measured, each.record
        read = _rate(record.bandwidth_gbs, "GB/s") if record else ""
        table.add_row(each.device, "memory, read", _rate(found.bandwidth_gbs, "GB/s"), read)
        table.add_row(each.device, "memory, copied: read and written", _rate(found.copy_gbs, "GB/s"), "")
        if record:
            name = "product of bfloat16 matrices of 8192 x 8192"
            here, there = (_rate(value, "TFLOP/s") for value in (found.matrix_tops, record.matrix_tops))
            table.add_row(each.device, name, here, there)
    return table


def _rate(value: float | None, unit: str) -> str:
    return "none" if value is None else f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
