"""The models behind one port, by name."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tilewright.compiler.errors import RequestError
from tilewright.runtime.engine import Engine
from tilewright.runtime.server.answers import ModelCard
from tilewright.runtime.server.errors import ApiError
from tilewright.runtime.types import TextCodec


@dataclass(eq=False)
class Served:
    """One model: its name, its engine, its tokenizer, and when it was loaded (seconds since 1970).

    reopen: loads the model anew and makes another engine; None where a dead engine ends the process. Raises UserError
    where what was loaded is not there any more. restarts: how often that was done.
    """

    name: str
    engine: Engine
    tokenizer: TextCodec
    reopen: Callable[[], Engine] | None = None
    restarts: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> ModelCard:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tilewright",
            "max_model_len": self.engine.capacity,
            "pooling": self.engine.pooling,
        }


class Models:
    """All that is served. RequestError where two have one name."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._by_name: dict[str, Served] = {}
        for each in served:
            if each.name in self._by_name:
                raise RequestError(f"two models are named {each.name!r}; name one of them otherwise, as NAME=MODEL")
            self._by_name[each.name] = each

    def __iter__(self) -> Iterator[Served]:
        return iter(self._by_name.values())

    def find(self, name: str) -> Served:
        """Raises ApiError 404."""
        served = self._by_name.get(name)
        if served is None:
            known = ", ".join(self._by_name)
            raise ApiError(
                404, f"model {name[:64]!r} is not served here; use {known}", code="model_not_found", param="model"
            )
        return served
