"""What commands share: models loaded and engines around them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tilewright.compiler import env
from tilewright.compiler.errors import RequestError

if TYPE_CHECKING:
    from tilewright.runtime.engine import Engine
    from tilewright.runtime.model import Model
    from tilewright.runtime.server.served import Served
    from tilewright.runtime.types import EngineLimits

# Of EngineLimits.max_stretch. Below 2 leaves room for what predictions miss, so that the 99th percentile between tokens
# at most doubles: on a virtual clock it does, and bench/long_prompt.py measures it. Off on GPUs unless asked for.
CPU_STRETCH = 1.6

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


def open_served(
    models: Sequence[str], threads: int | None, limits: "EngineLimits", restart: bool = False
) -> "list[Served]":
    """Loads each of `models`, as MODEL or NAME=MODEL, with an engine around it that lives as long as the process.

    limits.max_stretch: None is what suits the device, 0 is none. restart: models may be opened again when their engine
    is dead. Raises RequestError where that can't be done.
    """
    from tilewright.cache import artifact_path
    from tilewright.runtime.engine import Engine
    from tilewright.runtime.model import load
    from tilewright.runtime.server.served import Served
    from tilewright.runtime.step_costs import StepCosts

    served = []
    for each in models:
        named = _NAMED.fullmatch(each)
        name, model = named.groups() if named else (None, each)
        path = artifact_path(model)
        loaded = load(path, threads=_threads(threads))
        tokenizer = loaded.tokenizer  # read now: the files may be replaced while the server runs
        if tokenizer is None:
            raise RequestError(f"{model} has no tokenizer, and a server speaks text; compile a source that has one")
        if restart and loaded.runs_ahead:
            raise RequestError(
                f"--restart can't restart {model}, which runs on a GPU: its context may be lost with the engine; leave "
                "--restart out, and let a supervisor start the process again"
            )
        own = replace(limits, max_stretch=_stretch(limits.max_stretch, loaded.runs_ahead))

        def reopen(path: Path = path, own: "EngineLimits" = own, manifest: object = loaded.manifest) -> Engine:
            again = load(path, threads=_threads(threads))
            if again.manifest != manifest:
                raise RequestError(f"{path} was replaced since it was loaded; start the server anew")
            return Engine(again, own, costs=StepCosts(again.floor))

        engine = Engine(loaded, own, costs=StepCosts(loaded.floor))
        served.append(Served(name or loaded.manifest.name, engine, tokenizer, reopen if restart else None))
    return served


def _stretch(given: float | None, gpu: bool) -> float | None:
    if given is None:
        return None if gpu else CPU_STRETCH
    return given or None


def _threads(given: int | None) -> int:
    if given is None:
        return env.threads()
    if not 1 <= given <= env.MAX_THREADS:
        raise RequestError(f"--threads is {given}; give a number from 1 to {env.MAX_THREADS}")
    return given
