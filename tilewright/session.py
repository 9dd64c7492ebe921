"""What commands share: models loaded and engines around them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewright.compiler import env
from tilewright.compiler.errors import RequestError

if TYPE_CHECKING:
    from tilewright.runtime.engine import Engine
    from tilewright.runtime.model import Model
    from tilewright.runtime.server.served import Served
    from tilewright.runtime.types import EngineLimits

_NAMED = re.compile(r"([^=/\\]{1,256})=(.+)")  # NAME=MODEL


@dataclass(frozen=True)
class Session:
    """A loaded model and the engine that serves it."""

    model: "Model"
    engine: "Engine"


@contextmanager
def open_session(model: str, threads: int | None = None, limits: "EngineLimits | None" = None) -> Iterator[Session]:
    """Loads `model`, an artifact or anything that can be compiled into one, and closes the engine at the end."""
    from tilewright.cache import artifact_path
    from tilewright.runtime.engine import Engine
    from tilewright.runtime.model import load

    loaded = load(artifact_path(model), threads=_threads(threads))
    engine = Engine(loaded, limits)
    try:
        yield Session(loaded, engine)
    finally:
        engine.close()


def open_served(models: Sequence[str], threads: int | None, limits: "EngineLimits") -> "list[Served]":
    """Loads each of `models`, as MODEL or NAME=MODEL, with an engine around it that lives as long as the process."""
    from tilewright.cache import artifact_path
    from tilewright.runtime.engine import Engine
    from tilewright.runtime.model import load
    from tilewright.runtime.server.served import Served

    served = []
    for each in models:
        named = _NAMED.fullmatch(each)
        name, model = named.groups() if named else (None, each)
        loaded = load(artifact_path(model), threads=_threads(threads))
        tokenizer = loaded.tokenizer  # read now: the files may be replaced while the server runs
        if tokenizer is None:
            raise RequestError(f"{model} has no tokenizer, and a server speaks text; compile a source that has one")
        served.append(Served(name or loaded.manifest.name, Engine(loaded, limits), tokenizer))
    return served


def _threads(given: int | None) -> int:
    if given is None:
        return env.threads()
    if not 1 <= given <= env.MAX_THREADS:
        raise RequestError(f"--threads is {given}; give a number from 1 to {env.MAX_THREADS}")
    return given
