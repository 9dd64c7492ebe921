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
    """An empty table; the columns named in `numeric` are aligned to the right. Without column names it has no head."""
    result = Table(title=title, header_style="bold", box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        result.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return result


def show(*tables: Table) -> None:
    """Prints tables to stdout, each below its title, an empty line between them."""
    console = out()
    with console.capture() as printed:
        for i, each in enumerate(tables):
            if i:
                console.print()
            # Apart from the table, which would wrap a title that is longer than its rows.
            console.print(str(each.title), style="bold", markup=False, soft_wrap=True)
            each.title = None
            console.print(each)
    # Written here, since rich ends the program by itself where the reader has gone.
    sys.stdout.write("\n".join(line.rstrip() for line in printed.get().split("\n")))
    sys.stdout.flush()


def size(count: float) -> str:
    """Bytes in decimal units, three digits: 98.4 MB."""
    return _scaled(count, ("B", "kB", "MB", "GB"))


def amount(count: float) -> str:
    """Operations in decimal units, three digits: 270 M."""
    return _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def _scaled(count: float, units: Sequence[str]) -> str:
    scale = 0
    while round(count) >= 1000 and scale < len(units) - 1:
        count /= 1000
        scale += 1
    return f"{count:.0f} {units[scale]}" if count >= 100 or not scale else f"{count:.3g} {units[scale]}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.8 s, 42 s, 3 min 5 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
