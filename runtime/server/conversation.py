"""Messages and tools on their way to tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.runtime.types import TextCodec


@dataclass(frozen=True)
class Conversation:
    """What the model is to continue. messages: as chat templates take them. tools: as OpenAI's API describes them."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()

    def tokens(self, tokenizer: TextCodec) -> list[int]:
        return tokenizer.encode_chat(self.messages, self.tools)

    @property
    def length(self) -> int:
        """Characters, roughly."""
        return sum(len(message["content"]) for message in self.messages) + len(str(self.tools))
