"""The IR after every pass, as numbered files."""

from pathlib import Path
from typing import Any

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
                raise CompileError(f"--dump {directory} can't be made ({error.strerror}); name another place") from None

    def __call__(self, mod: Any, name: str) -> None:
        if self._directory is not None:
            (self._directory / f"{self._count:03d}_{name}.py").write_text(mod.script(show_meta=True))
            self._count += 1
