"""Streaming gives the text of decoding all at once, for any token sequence, and never a piece of a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.tokenizers_made import EOS, TEXT, byte_fallback, byte_level
from tilewright.runtime.tokenizer import Tokenizer

MADE = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": lambda: byte_fallback(strip=0),
    "byte_fallback_stripped_twice": lambda: byte_fallback(strip=2),
}


@pytest.fixture(scope="module", params=MADE)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(MADE[request.param]())


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.detokenizer()
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    raw = sorted(tokenizer._library.get_vocab().values())
    continuation = [i for i in raw if tokenizer.decode([i]) == "�"]  # pieces of characters, half of the time
    token = st.one_of(st.sampled_from(raw), st.sampled_from(continuation), st.integers(0, len(raw) + 5))
    ids = data.draw(st.lists(token, max_size=40))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(max_size=30), st.sampled_from(TEXT)))
def test_any_text_without_broken_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "�" not in tokenizer.decode(ids):
        assert not any("�" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = Tokenizer(byte_level())
    letters = [tokenizer._library.token_to_id(c) for c in "aðŁĻĤb"]  # F0 9F 99 82 between a and b
    assert stream(tokenizer, letters) == ["a", "", "", "", "🙂", "b", ""]


def test_tail_is_the_text_if_it_ended_here() -> None:
    tokenizer = Tokenizer(byte_fallback())
    newline = tokenizer._library.token_to_id("<0x0A>")
    decoder = tokenizer.detokenizer()
    first = decoder.push(tokenizer.encode("dog")[-1])
    assert decoder.push(newline) == "" and decoder.tail() == "\n"
    assert first + decoder.finish() == tokenizer.decode([tokenizer.encode("dog")[-1], newline])


def test_special_tokens_have_no_text_and_join_what_they_part() -> None:
    tokenizer = Tokenizer(byte_level())
    end = tokenizer._library.token_to_id(EOS)
    pieces = [tokenizer._library.token_to_id(c) for c in "ä¸Ń"]  # the bytes E4 B8 AD of 中 in GPT-2's alphabet
    assert stream(tokenizer, [pieces[0], end, *pieces[1:]]) == ["", "", "", "中", ""]
