"""Stop strings across borders of pieces, and how samples end."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fake import LIMITS, Bench, completions
from tests.runtime.tokenizers_made import byte_fallback, byte_level
from tilewright.runtime.output import StopMatcher
from tilewright.runtime.tokenizer import Tokenizer
from tilewright.runtime.types import DeviceLimits, SamplingParams

SHORT = st.text("ab\n", max_size=4)


def before_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The shortest beginning of `text` that ends with a stop string, without it (if two, the longest)."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(SHORT, max_size=12), stops=st.lists(SHORT.filter(bool), min_size=1, max_size=3))
def test_stop_strings_in_pieces(pieces: list[str], stops: list[str]) -> None:
    whole, found = before_stop("".join(pieces), stops)
    matcher, said, stopped = StopMatcher(stops), "", False
    for count, piece in enumerate(pieces, 1):
        new, stopped = matcher.push(piece)
        said += new
        assert whole.startswith(said), "a part of a stop string was emitted"
        if stopped:
            assert before_stop("".join(pieces[:count]), stops)[1]
            break
        so_far = "".join(pieces[:count])
        held = so_far[len(said) :]
        assert held == "" or any(stop.startswith(held) for stop in stops), "text was held back without need"
    assert stopped == found
    assert said + ("" if stopped else matcher.finish()) == whole


class Scripted:
    """A fake device's results replaced by a script, to see what the text does."""

    def __init__(self, tokenizer: Tokenizer, text_ids: list[int]) -> None:
        vocab = tokenizer.vocab_size
        self.bench = Bench(DeviceLimits(**{**LIMITS.__dict__, "vocab_size": vocab}), tokenizer=tokenizer)
        step, script = self.bench.model.step, iter(text_ids)

        def scripted(batch):
            result = step(batch)
            result.token_ids[:] = next(script)
            return result

        self.bench.model.step = scripted

    def run(self, **params) -> tuple[str, list[str]]:
        request = self.bench.submit([1], SamplingParams(**params))
        while not request.finished:
            self.bench.core.turn()
        pieces = [event.text for _, event in self.bench.events]
        [completion] = completions(request)
        assert "".join(pieces) == completion.text
        return completion.finish_reason, pieces


def test_stop_string_over_tokens() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = [i for c in "the dog, and" for i in tokenizer.encode(c)]
    reason, pieces = Scripted(tokenizer, ids).run(stop=("dog,", "xyz"))
    assert (reason, "".join(pieces)) == ("stop", "the ")
    assert len(pieces) == len("the dog,"), "ended with the token that completed it"


def test_held_text_comes_when_no_stop_string_follows() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = [i for c in "the do" for i in tokenizer.encode(c)]
    reason, pieces = Scripted(tokenizer, ids).run(stop="dog", max_tokens=6)
    assert reason == "length" and pieces == ["t", "h", "e", " ", "", "do"]


def test_stop_string_of_raw_bytes_ends_at_once() -> None:
    """A byte token's text is certain only with the next token; a stop string need not wait for it."""
    tokenizer = Tokenizer(byte_fallback())
    newline = tokenizer._library.token_to_id("<0x0A>")
    ids = [tokenizer.encode("dog")[-1], newline, newline, newline]
    reason, pieces = Scripted(tokenizer, ids).run(stop="\n\n")
    assert reason == "stop" and len(pieces) == 3 and "\n" not in "".join(pieces)


def test_stop_token_has_no_text_and_releases_what_was_held() -> None:
    tokenizer = Tokenizer(byte_level(), {"stop_token_ids": [7]})
    ids = [*tokenizer.encode("t"), *tokenizer.encode("h"), 7]
    reason, pieces = Scripted(tokenizer, ids).run(stop="the")
    assert reason == "stop" and pieces == ["", "", "th"]


def test_ignored_end_goes_on() -> None:
    tokenizer = Tokenizer(byte_level(), {"stop_token_ids": [7]})
    reason, pieces = Scripted(tokenizer, [7, 7, 7]).run(ignore_eos=True, max_tokens=3)
    assert reason == "length" and "".join(pieces) == tokenizer.decode([7, 7, 7])


def test_stop_strings_wait_for_the_minimum_length() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = [i for c in "ababab" for i in tokenizer.encode(c)]
    reason, pieces = Scripted(tokenizer, ids).run(stop="ab", min_tokens=3)
    assert reason == "stop" and "".join(pieces) == "ab"
