"""What a choice says: text and calls out of the events of its generation."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from tilewright.runtime.server.tool_requests import Calling
from tilewright.runtime.tool_parser import Called, Piece, Said
from tilewright.runtime.types import TextCodec

_MISTRAL_ID = 9  # characters: Mistral's templates take no other length


@dataclass
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Speech:
    """One choice as it grows: `push` takes pieces of text and tells what they mean."""

    tokenizer: TextCodec
    calling: Calling
    text: str = ""
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parser = self.calling.parser(self.tokenizer)

    def push(self, text: str, last: bool) -> list[Piece]:
        """last: nothing comes after it."""
        if self._parser is None:
            pieces: list[Piece] = [Said(text)] if text else []
        else:
            pieces = [*self._parser.push(text), *(self._parser.finish() if last else ())]
        self._note(pieces)
        return pieces

    def _note(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Said):
                self.text += piece.text
            elif isinstance(piece, Called):
                self.calls.append(Call(self._identity(), piece.name))
            else:
                self.calls[piece.index].arguments += piece.text

    def _identity(self) -> str:
        if self.tokenizer.tool_form.name == "mistral":
            return secrets.token_hex(_MISTRAL_ID)[:_MISTRAL_ID]
        return f"call_{secrets.token_hex(12)}"
