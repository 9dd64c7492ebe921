"""What `generate`, `chat` and `bench` share: a model loaded and an engine around it, for as long as a command runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewright.compiler import env
from tilewright.compiler.errors import RequestError

if TYPE_CHECKING:
    from tilewright.runtime.engine import Engine
    from tilewright.runtime.model import Model


@dataclass(frozen=True)
class Session:
    """A loaded model and the engine that serves it."""

    model: "Model"
    engine: "Engine"


@contextmanager
def open_session(model: str, threads: int | None = None) -> Iterator[Session]:
    """Loads `model`, an artifact or anything that can be compiled into one, and closes the engine at the end."""
    from tilewright.cache import artifact_path
    from tilewright.runtime.engine import Engine
    from tilewright.runtime.model import load

    loaded = load(artifact_path(model), threads=_threads(threads))
    engine = Engine(loaded)
    try:
        yield Session(loaded, engine)
    finally:
        engine.close()


def _threads(given: int | None) -> int:
    if given is None:
        return env.threads()
    if not 1 <= given <= env.MAX_THREADS:
        raise RequestError(f"--threads is {given}; give a number from 1 to {env.MAX_THREADS}")
    return given
