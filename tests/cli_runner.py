"""Runs the command line in this process: exit code, standard output, standard error."""

import io
import sys
from collections.abc import Callable

import pytest

from tilewright import cli
from tilewright.compiler import env

Result = tuple[int, str, str]


def make_runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """run(*arguments, stdin=bytes or text) -> (exit code, stdout, stderr), with no variable of ours set."""
    for name in env.NAMES:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, stdin: str | bytes = b"") -> Result:
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(arguments))
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    return run
