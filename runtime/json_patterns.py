"""Patterns of JSON schemas, which are ECMAScript's regular expressions, as Rust's, which llguidance takes.

Where the two read the same text otherwise, the text is changed so that Rust's matches no more than ECMAScript's.
"""

import re

from tilewright.compiler.errors import GrammarError

# White space of both: Rust's has U+0085 besides, ECMAScript's U+FEFF, and Python's the separators at U+001C.
_SPACE = r"\t\n\x0b\f\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CHANGED = {
    r"\s": f"[{_SPACE}]",
    r"\S": r"[^\s\x1c-\x1f\x85\ufeff]",
    ".": r"[^\n\r\u2028\u2029]",
}

# What llguidance lets through of these formats: February 29 in any year, and leap seconds at any time.
_LEAP_YEAR = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = rf"({_LEAP_YEAR}-.{{5}}|.{{4}}-(0[13-9]|1[0-2])-.{{2}}|.{{4}}-02-([01].|2[0-8]))"
_TIME = r".{2}:.{2}:[0-5].*"
DATES = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}.{_TIME}$"}

_PIECE = re.compile(r"\\.|\.|\[\^?(?:\\.|[^\]\\])*\]", re.DOTALL)


def rust_pattern(pattern: str) -> str:
    """The pattern for llguidance. GrammarError where a class of characters can't be told the same way."""
    return _PIECE.sub(lambda piece: _piece(piece.group()), pattern)


def _piece(piece: str) -> str:
    return _class(piece) if piece.startswith("[") else _CHANGED.get(piece, piece)


def _class(text: str) -> str:
    """A class. In Rust's, `[` begins another one within, and && -- ~~ join two."""
    head, inner = ("[^", text[2:-1]) if text.startswith("[^") else ("[", text[1:-1])
    if not inner or "--" in inner:
        raise GrammarError(f"the json_schema is not supported (the class {text} of a pattern); write it otherwise")
    return head + re.sub(r"\\.|[\[&~]", _within, inner, flags=re.DOTALL) + "]"


def _within(piece: re.Match[str]) -> str:
    text = piece.group()
    return _CHANGED.get(text, text) if text.startswith("\\") else f"\\{text}"
