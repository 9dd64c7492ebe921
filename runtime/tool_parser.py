"""Calls of functions out of an answer's text as it comes: what is certain is told at once, arguments piece by piece.

What begins like a call and is none, for it is no JSON or names no function that there is, stays text. Text and calls
are the same in whatever pieces the answer comes.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tilewright.runtime.tools import ToolForm


@dataclass(frozen=True)
class Said:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Called:
    """The call at place `index` has begun."""

    index: int
    name: str


@dataclass(frozen=True)
class Argued:
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


Piece = Said | Called | Argued

_STRING = r'"(?:[^"\\]|\\.)*"'
_HEAD = re.compile(rf'\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')
_BETWEEN = " \t\r\n,;[]"  # between calls, and around a list of them


class CallParser:
    """The calls of one answer. names: of the functions that there are. several: whether more than one call counts;
    what follows the first is dropped otherwise."""

    def __init__(self, form: ToolForm, names: Iterable[str], several: bool = True) -> None:
        self._form, self._names, self._several = form, frozenset(names), several
        self._state: Callable[[], list[Piece] | None] = self._beginning if form.alone else self._outside
        self._held = ""  # of the text, not told yet
        self._marker = ""  # what stood before a call that is being read: text again, if it is none
        self._scan, self._looked = _Scanner(), 0
        self._told = False  # whether there was text
        self._blank = False  # whether nothing but blanks came since the last call
        self.calls = 0

    def push(self, text: str) -> list[Piece]:
        """What this text made certain."""
        self._held += text
        pieces: list[Piece] = []
        while (found := self._state()) is not None:
            pieces += found
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing more comes."""
        rest, self._held = self._held, ""
        if self._state in (self._arguments, self._ending, self._done):
            return []
        if self._state == self._between and self.calls and self._blank:
            return []
        text = self._marker + rest
        return [Said(text)] if text and not (self._blank and not text.strip()) else []

    # Each state takes what it can off `_held` and returns pieces, or None where it needs more text.

    def _beginning(self) -> list[Piece] | None:
        """Of an answer that is either text or calls."""
        rest = self._held.lstrip()
        begin = self._form.begin
        if not rest or (begin and begin.startswith(rest) and rest != begin):
            return None
        marked = bool(begin) and rest.startswith(begin)
        listed = self._form.listed and rest.startswith("[")
        if not (marked or listed or rest.startswith("{")):
            return self._go(self._plain)
        self._marker, self._held = self._held[: -len(rest)] + begin * marked, rest[len(begin) * marked :]
        return self._go(self._between)

    def _plain(self) -> list[Piece] | None:
        if not self._held:
            return None
        text, self._held = self._held, ""
        return [Said(text)]

    def _outside(self) -> list[Piece] | None:
        """In text, where a call may begin. Blanks before calls are no text, nor those between calls."""
        if self._blank and not self._told:
            self._held = self._held.lstrip()
        begin = self._form.begin
        at = self._held.find(begin)
        if at >= 0:
            text, self._held = self._held[:at], self._held[at + len(begin) :]
            said = text.rstrip()
            self._marker = text[len(said) :] + begin
            self._state = self._between
            return self._say(said)
        keep = next(
            (n for n in range(min(len(begin) - 1, len(self._held)), 0, -1) if self._held.endswith(begin[:n])), 0
        )
        said = self._held[: len(self._held) - keep].rstrip()
        if not said:
            return None
        self._held = self._held[len(said) :]
        return self._say(said)

    def _between(self) -> list[Piece] | None:
        """After the beginning or a call, before a call or the end."""
        rest, end = self._held.lstrip(_BETWEEN), self._form.end
        self._marker += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if not rest or (end and end.startswith(rest) and rest != end):
            return None
        if rest.startswith("{"):
            self._scan, self._looked = _Scanner(), 0
            return self._go(self._call)
        if end and rest.startswith(end):
            self._held, self._marker = rest[len(end) :], ""
            return self._go(self._outside)
        return self._refuse()

    def _call(self) -> list[Piece] | None:
        """Name first, then arguments: all forms write them so. Anything else is read when it is complete."""
        head = _HEAD.match(self._held)
        if head is None:
            end = self._scan.end(self._held[self._looked :])
            start, self._looked = self._looked, len(self._held)
            return None if end is None else self._whole(start + end)
        name = _parsed(head[1])
        if name not in self._names:
            return self._refuse()
        self._held = self._held[head.end() :]
        self._scan = _Scanner()
        self._state = self._arguments
        self.calls += 1
        return [Called(self.calls - 1, name)]

    def _whole(self, end: int) -> list[Piece]:
        """A call whose object ends there."""
        call = _parsed(self._held[:end])
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return self._refuse()
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):  # JSON within JSON
            arguments = _parsed(arguments)
        written = _written(arguments)
        if written is None:
            return self._refuse()
        self._held = self._held[end:]
        self.calls += 1
        self._called()
        index = self.calls - 1
        return [Called(index, name), Argued(index, written)]

    def _arguments(self) -> list[Piece] | None:
        if not self._held:
            return None
        end = self._scan.end(self._held)
        text, self._held = (self._held, "") if end is None else (self._held[:end], self._held[end:])
        if end is not None:
            self._scan = _Scanner(depth=1)
            self._state = self._ending
        return [Argued(self.calls - 1, text)]

    def _ending(self) -> list[Piece] | None:
        """What else stands in the call's object."""
        end = self._scan.end(self._held)
        self._held = "" if end is None else self._held[end:]
        if end is None:
            return None
        self._called()
        return []

    def _done(self) -> list[Piece] | None:
        self._held = ""
        return None

    def _called(self) -> None:
        self._marker, self._blank = "", True
        self._state = self._between if self._several else self._done

    def _refuse(self) -> list[Piece]:
        """What was held is text."""
        self._held, self._marker = self._marker + self._held, ""
        if self._form.alone:
            return self._go(self._plain)
        skipped = len(self._held) - len(self._held.lstrip()) + 1  # so that the same marker is not found again
        text, self._held = self._held[:skipped], self._held[skipped:]
        self._state = self._outside
        return self._say(text)

    def _say(self, text: str) -> list[Piece]:
        self._blank, self._told = self._blank and not text, self._told or bool(text)
        return [Said(text)] if text else []

    def _go(self, state: Callable[[], list[Piece] | None]) -> list[Piece]:
        self._state = state
        return []


class _Scanner:
    """Finds where a JSON object ends, in text that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._quoted, self._escaped = depth, False, False

    def end(self, text: str) -> int | None:
        """Behind the brace that closes the object; None where it is not in this piece."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = char == "\\", char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None


def _parsed(text: str) -> Any:
    """JSON's value; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _written(value: Any) -> str | None:
    """An object as JSON, and as Unicode: half of a surrogate pair stays escaped. None where it is no object, or holds a
    number that JSON has not."""
    if not isinstance(value, dict):
        return None
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return text.encode(errors="backslashreplace").decode()
