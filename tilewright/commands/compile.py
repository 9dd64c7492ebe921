"""`tilewright compile`: a model in, an artifact out."""

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "An alias such as smollm2-135m, a Hugging Face directory, a .gguf file, or a hub id org/name."


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    target: Annotated[
        str, typer.Option(help="What to compile for: cpu, cuda, or a named machine. auto: what this machine has.")
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="NAME.tw", help="Where to; the model's name by default.")
    ] = None,
    weights: Annotated[str, typer.Option(metavar="auto|random:SEED", help="The model's own, or random.")] = "auto",
    quant: Annotated[
        str, typer.Option(metavar="auto|none|FORMAT", help="auto keeps the source's format; none computes in float32.")
    ] = "auto",
    max_batch: Annotated[
        int | None, typer.Option(help="Most sequences in a step; by default 16 on a CPU, 256 on a GPU.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in a step; by default 512 on a CPU, 2048 on a GPU.")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens in a page of the KV cache.")] = 16,
    strict: Annotated[
        bool, typer.Option("--strict", help="The same bits for a token generated or read back as part of a prompt.")
    ] = False,
    pooling: Annotated[
        str, typer.Option(metavar="last|mean", help="What /v1/embeddings gives: the last token's state, or the mean.")
    ] = "last",
    dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the program after each pass into this directory.")
    ] = None,
    logs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take tuning records from here, not from the installation's.")
    ] = None,
) -> None:
    """Compile MODEL into one sealed artifact."""
    import time

    import tilewright
    from tilewright.progress_display import compile_progress
    from tilewright.summary import show_summary

    start = time.monotonic()
    with compile_progress() as report:
        artifact = tilewright.compile(
            model,
            target=target,
            output=output,
            weights=weights,
            quant=quant,
            max_batch=max_batch,
            max_tokens=max_tokens,
            page_size=page_size,
            strict=strict,
            pooling=pooling,
            dump=dump,
            logs=logs,
            progress=report,
        )
    show_summary(artifact, time.monotonic() - start)
