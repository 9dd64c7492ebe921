"""Log probabilities as OpenAI's two APIs show them."""

from collections.abc import Iterable, Sequence

from tilewright.runtime.request import Request
from tilewright.runtime.server.answers import ChatLogprobs, ChatTopLogprob, TextLogprobs
from tilewright.runtime.types import TextCodec, TokenLogprob

_LEAST = -9999.0  # OpenAI's number for what can't be drawn: JSON has no infinity


def spoken(logprobs: Iterable[TokenLogprob | None], request: Request) -> list[TokenLogprob]:
    """Those of an answer's text: a token that only ends it is not a part of it."""
    return [each for each in logprobs if each is not None and each.token_id not in request.stop_ids]


def chat_logprobs(tokenizer: TextCodec, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    return {
        "content": [
            {
                **_chat_token(tokenizer, each.token_id, each.logprob),
                "top_logprobs": [_chat_token(tokenizer, token, value) for token, value in each.top],
            }
            for each in logprobs
        ]
    }


def text_logprobs(tokenizer: TextCodec, logprobs: Sequence[TokenLogprob], offset: int) -> TextLogprobs:
    """offset: characters of the text before the first of these tokens."""
    tokens = [_text(tokenizer, each.token_id) for each in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(each.logprob) for each in logprobs],
        "top_logprobs": [{_text(tokenizer, token): _finite(value) for token, value in each.top} for each in logprobs],
        "text_offset": offsets,
    }


def _chat_token(tokenizer: TextCodec, token: int, logprob: float) -> ChatTopLogprob:
    spelling = tokenizer.spelling(token)
    return {"token": spelling.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(spelling)}


def _text(tokenizer: TextCodec, token: int) -> str:
    return tokenizer.spelling(token).decode(errors="replace")


def _finite(value: float) -> float:
    return max(value, _LEAST)
