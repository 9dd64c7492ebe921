"""Tokens to text, one at a time: what is emitted is certain, and together it equals decoding all tokens at once.

Two ways. A byte-level vocabulary spells every token in bytes, so an incremental UTF-8 decoder is exact. Any other
decoder is asked for the text of a window of tokens; a cut is safe after a token that is no raw byte and leaves no
replacement character at the end, because only runs of byte tokens are read jointly.
"""

import codecs
import re
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


class ByteLevelStream:
    """One sample's text where each token is a sequence of bytes. `spell` gives them; special tokens have none."""

    def __init__(self, spell: Callable[[int], bytes]) -> None:
        self._spell = spell
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token made certain."""
        return self._decoder.decode(self._spell(token))

    def tail(self) -> str:
        """The text that would follow if the sample ended here: of an unfinished character, none worth a look."""
        return ""

    def finish(self) -> str:
        """The text of what was held back."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """One sample's text by a decoder of any kind.

    decode: token ids -> text. spoken: tokens that have a text (known, not special). raw: those that stand for a byte.
    """

    def __init__(self, decode: Callable[[list[int]], str], spoken: frozenset[int], raw: frozenset[int]) -> None:
        self._decode, self._spoken, self._raw = decode, spoken, raw
        self._context: list[int] = []  # emitted tokens that what follows is decoded behind
        self._before = ""  # their text
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        if token not in self._spoken:
            return ""
        self._pending.append(token)
        if token in self._raw:
            return ""
        text = self._decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._commit(text)

    def tail(self) -> str:
        if not self._pending:
            return ""
        return self._decode(self._context + self._pending)[len(self._before) :]

    def finish(self) -> str:
        text, self._pending = self.tail(), []
        return text

    def _commit(self, text: str) -> str:
        """Emits the window's new text. Only the last run stays as context, once it has a text of its own: a decoder
        that strips the beginning of a text has then done so within the context."""
        new = text[len(self._before) :]
        alone = self._decode(self._pending)
        if alone:
            self._context, self._before = self._pending, alone
        else:
            self._context, self._before = self._context + self._pending, text
        self._pending = []
        return new


class Detokenizer:
    """Makes streams for one tokenizer. settings: the parsed tokenizer.json."""

    def __init__(self, library: "Library", settings: dict) -> None:
        self._library = library
        self._special = {t["id"] for t in settings.get("added_tokens", ()) if t.get("special")}
        self._byte_level = _is_byte_level(settings.get("decoder"))
        self._spellings: dict[int, bytes] = {}

    def stream(self) -> ByteLevelStream | WindowStream:
        if self._byte_level:
            return ByteLevelStream(self._spell)
        return WindowStream(self._library.decode, *self._spoken_and_raw)

    def spelling(self, token: int) -> bytes:
        """The bytes that a token stands for in a text: a special token's are its name, an unknown one has none."""
        text = self._library.id_to_token(token) or ""
        if token in self._special:
            return text.encode()
        if self._byte_level:
            return self._spell(token)
        return bytes([int(text[3:5], 16)]) if _BYTE_TOKEN.fullmatch(text) else text.replace("▁", " ").encode()

    @cached_property
    def _spoken_and_raw(self) -> tuple[frozenset[int], frozenset[int]]:
        spoken = {i: token for token, i in self._library.get_vocab().items() if i not in self._special}
        return frozenset(spoken), frozenset(i for i, token in spoken.items() if _BYTE_TOKEN.fullmatch(token))

    def _spell(self, token: int) -> bytes:
        spelling = self._spellings.get(token)
        if spelling is None:
            text = "" if token in self._special else self._library.id_to_token(token) or ""
            spelling = self._spellings[token] = _byte_level_bytes(text)
        return spelling


def _is_byte_level(decoder: dict | None) -> bool:
    if decoder is not None and decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and _is_byte_level(decoder["decoders"][0])
    return decoder is not None and decoder["type"] == "ByteLevel"


def _byte_level_bytes(token: str) -> bytes:
    """A token's bytes; one with a character outside the alphabet (an added token) is plain text."""
    try:
        return bytes(_ALPHABET[c] for c in token)
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible stand-ins for bytes: printable Latin-1 stands for itself, the others follow from U+0100."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()
