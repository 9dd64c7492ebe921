"""`tilewright bench`: how fast an artifact answers, beside its floor, as a table and a line of a results file."""

import datetime
import enum
import json
from pathlib import Path
from typing import Annotated

import typer

from tilewright.commands.sampling import Threads


class Kind(str, enum.Enum):
    latency = "latency"
    throughput = "throughput"


def command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A directory made by compile.")],
    kind: Annotated[Kind, typer.Argument(help="latency: one request at a time. throughput: many at once.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to append the result, a line of JSON.")
    ] = Path("bench-results.jsonl"),
    threads: Threads = None,
) -> None:
    """Time an artifact and append the result to a file."""
    from tilewright import console, timing
    from tilewright.compiler.artifact import Artifact
    from tilewright.compiler.errors import UserError
    from tilewright.session import open_session

    opened = Artifact.open(artifact, check=False)  # loading checks it
    try:
        results = output.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output} can't be written ({error.strerror}); name another file with --output") from None
    with results, open_session(str(artifact), threads) as session:
        measure = {Kind.latency: timing.latency, Kind.throughput: timing.throughput}[kind]
        rows = measure(session, opened)
        columns = list(rows[0])
        table = console.table(f"{kind.value} of {opened.manifest.name}", *columns, numeric=columns)
        for row in rows:
            table.add_row(*(timing.words(value) for value in row.values()))
        console.show(table)
        record = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "kind": kind.value,
            **timing.circumstances(session, opened),
            "rows": rows,
        }
        results.write(json.dumps(record) + "\n")
    console.note(f"appended to {output}")
