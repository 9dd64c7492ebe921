"""`tilewright verify`: an artifact against the reference implementation, layer by layer."""

import math
from pathlib import Path
from typing import Annotated

import typer


def command(artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A directory made by compile.")]) -> None:
    """Compare an artifact with the reference implementation, layer by layer; exit 1 where one is too far off."""
    from tilewright import console
    from tilewright.compiler.artifact import Artifact

    opened = Artifact.open(artifact)  # before what is slow to load
    from tilewright.compiler.verify_artifact import verify

    layers = verify(opened)
    table = console.table("Against the reference", "layer", "error", "allowed", "", numeric=("error", "allowed"))
    for layer in layers:
        verdict = "" if layer.error <= layer.allowed else "too far off"
        table.add_row(layer.name, f"{layer.error:.2e}", f"{layer.allowed:.2e}", verdict)
    console.show(table)
    worst = max(layers, key=lambda layer: _share(layer.error, layer.allowed))
    print(f"\nworst layer: {worst.name}, error {worst.error:.2e} of {worst.allowed:.2e} allowed")
    if not worst.error <= worst.allowed:
        raise typer.Exit(1)


def _share(error: float, allowed: float) -> float:
    """How much of what is allowed an error uses up; not-a-number is worse than any number."""
    return math.inf if math.isnan(error) else error / allowed
