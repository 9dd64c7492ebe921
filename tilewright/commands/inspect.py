"""`tilewright inspect`: what is in an artifact."""

from pathlib import Path
from typing import Annotated

import typer


def command(artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A directory made by compile.")]) -> None:
    """Show an artifact's manifest, kernels and memory plan."""
    from tilewright import console
    from tilewright.compiler.artifact import Artifact
    from tilewright.summary import kernel_table, manifest_table, memory_table, show_warnings

    opened = Artifact.open(artifact)
    manifest = opened.manifest
    console.show(manifest_table(opened), kernel_table(manifest), memory_table(manifest))
    show_warnings(manifest)
