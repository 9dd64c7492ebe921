"""Where the command line writes: results to stdout, everything else to stderr, numbers in units people read."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def out() -> Console:
    """Tables and other results. Made when asked, so that a redirected stdout is the one used.

    A pipe has no width: rows stay whole there, for grep and awk.
    """
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 10_000)


def err() -> Console:
    """Progress, notices and errors."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """One line for the person at the terminal, apart from the result."""
    err().print(text, style="dim", markup=False)


def warn(text: str) -> None:
    err().print(f"warning: {text}", style="yellow", markup=False)


def error(text: str) -> None:
    err().print(f"error: {text}", style="red", markup=False)


def table(title: str, *columns: str, numeric: Sequence[str] = ()) -> Table:
    """An empty table; the columns named in `numeric` are aligned to the right."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        result.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return result


def show(*tables: Table) -> None:
    """Prints tables to stdout, one empty line between them."""
    console = out()
    for i, each in enumerate(tables):
        if i:
            console.print()
        console.print(each)


def size(count: float) -> str:
    """Bytes in decimal units, three digits: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"


def amount(count: float) -> str:
    """Operations in decimal units, three digits: 270 M."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000 or unit == "T":
            break
        count /= 1000
    return f"{count:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.8 s, 42 s, 3 min 5 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
