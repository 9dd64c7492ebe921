"""Every environment variable that tilewright reads, in one place.

| variable | value | default | meaning |
|---|---|---|---|
| TILEWRIGHT_CACHE_DIR | a directory | $XDG_CACHE_HOME/tilewright, else ~/.cache/tilewright | what later runs use |
| TILEWRIGHT_TUNING_LOGS | a directory | tuning_logs of the installation | what `tune` found out |
| TILEWRIGHT_THREADS | 1 to 1024 | the cores this process may use | threads a model computes with |
| TILEWRIGHT_JOBS | 1 to 1024 | the cores this process may use | kernels compiled at the same time |
| TILEWRIGHT_API_KEYS | texts of 16 characters or more, commas between | none | who may ask `tilewright serve` |
| TILEWRIGHT_DEBUG | 0 or 1 | 0 | a traceback for an error inside tilewright |

Options on the command line and arguments in Python come first. A bad value raises UserError, and so does a variable
that starts with TILEWRIGHT_ and is not in this table: a misspelt one would be ignored otherwise.
"""

import os
from difflib import get_close_matches
from pathlib import Path

from tilewright.compiler.errors import UserError
from tilewright.compiler.targets import host

PREFIX = "TILEWRIGHT_"
CACHE_DIR = "TILEWRIGHT_CACHE_DIR"
TUNING_LOGS = "TILEWRIGHT_TUNING_LOGS"
THREADS = "TILEWRIGHT_THREADS"
JOBS = "TILEWRIGHT_JOBS"
DEBUG = "TILEWRIGHT_DEBUG"
API_KEYS = "TILEWRIGHT_API_KEYS"
NAMES = (CACHE_DIR, TUNING_LOGS, THREADS, JOBS, DEBUG, API_KEYS)

MAX_THREADS = 1024


def check() -> None:
    """Raises UserError for a value out of range, and for a TILEWRIGHT_ variable that does not exist."""
    for name in sorted(n for n in os.environ if n.startswith(PREFIX) and n not in NAMES):
        near = get_close_matches(name.removeprefix(PREFIX), [n.removeprefix(PREFIX) for n in NAMES], n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else f"known are {', '.join(NAMES)}"
        raise UserError(f"unknown environment variable {name}; {hint}")
    cache_dir()
    tuning_logs()
    threads()
    jobs()
    api_keys()
    debug()


def cache_dir() -> Path:
    """Where compiled kernels and artifacts are kept between runs. It need not exist yet."""
    value = os.environ.get(CACHE_DIR)
    if value is None:
        base = os.environ.get("XDG_CACHE_HOME", "")
        # The base directory specification says to ignore a relative path there.
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "tilewright"
    return _directory(CACHE_DIR, value)


def tuning_logs() -> Path:
    """Where tuning records are written and read. It need not exist yet."""
    value = os.environ.get(TUNING_LOGS)
    return Path(__file__).parents[1] / "tuning_logs" if value is None else _directory(TUNING_LOGS, value)


def threads() -> int:
    """Threads that a model computes with."""
    return _count(THREADS)


def jobs() -> int:
    """Kernels that are compiled at the same time."""
    return _count(JOBS)


def api_keys() -> tuple[str, ...]:
    """Keys that the server's clients must show one of. Empty: anybody may ask."""
    value = os.environ.get(API_KEYS)
    if value is None:
        return ()
    keys = tuple(key.strip() for key in value.split(","))
    if not all(keys):
        raise UserError(f"{API_KEYS} has an empty key; write keys with single commas between them, or unset it")
    return keys


def debug() -> bool:
    """Whether an error inside tilewright shows its traceback."""
    value = os.environ.get(DEBUG, "0")
    if value not in ("0", "1"):
        raise UserError(f"{DEBUG}={value!r} is neither 0 nor 1; set one of them or unset it")
    return value == "1"


def _directory(name: str, value: str) -> Path:
    expanded = os.path.expanduser(value)  # leaves the "~" of an unknown user
    path = Path(expanded).absolute()
    if not value or expanded.startswith("~") or (path.exists() and not path.is_dir()):
        raise UserError(f"{name}={value!r} is not a directory; name one that exists or can be made")
    return path


def _count(name: str) -> int:
    value = os.environ.get(name)
    if value is None:
        return host.cores()
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= MAX_THREADS:
        raise UserError(f"{name}={value!r} is not a whole number from 1 to {MAX_THREADS}; set one or unset it")
    return int(value)
