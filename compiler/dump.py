"""The IR after every pass, as numbered files."""

from pathlib import Path
from typing import Any, NoReturn

from tilewright.compiler.errors import CompileError


class Dump:
    """Writes NNN_passname.py into a directory after each pass, if there is one."""

    def __init__(self, directory: Path | None):
        self._directory = directory
        self._count = 0
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self._refuse(error)

    def __call__(self, mod: Any, name: str) -> None:
        if self._directory is not None:
            try:
                (self._directory / f"{self._count:03d}_{name}.py").write_text(mod.script(show_meta=True))
            except OSError as error:
                self._refuse(error)
            self._count += 1

    def _refuse(self, error: OSError) -> NoReturn:
        raise CompileError(
            f"--dump {self._directory} can't be written to ({error.strerror}); name another directory"
        ) from None
