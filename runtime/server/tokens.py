"""/tokenize and /detokenize: what a text or a conversation is to a model, and back."""

from starlette.requests import Request
from starlette.responses import JSONResponse

from tilewright.runtime.server.answers import Text, TokenList
from tilewright.runtime.server.body import read
from tilewright.runtime.server.chat_requests import TokenizeRequest
from tilewright.runtime.server.errors import ApiError
from tilewright.runtime.server.requests import DetokenizeRequest
from tilewright.runtime.server.service import Service


async def tokenize(http: Request) -> JSONResponse:
    service: Service = http.app.state.service
    body = await read(http, TokenizeRequest, service.limits)
    served = service.models.find(body.model)

    def encode() -> list[int]:
        if body.messages is None:
            return served.tokenizer.encode(body.prompt or "")
        return body.conversation.tokens(served.tokenizer)

    tokens = await service.encode(True, encode)
    answer: TokenList = {"count": len(tokens), "max_model_len": served.engine.capacity, "tokens": tokens}
    return JSONResponse(answer)


async def detokenize(http: Request) -> JSONResponse:
    service: Service = http.app.state.service
    body = await read(http, DetokenizeRequest, service.limits)
    served = service.models.find(body.model)
    vocabulary = served.engine.vocab_size
    unknown = next((token for token in body.tokens if token >= vocabulary), None)
    if unknown is not None:
        message = f"token {unknown} is not in the vocabulary of {vocabulary}; remove it"
        raise ApiError(400, message, code="model_limit", param="tokens")
    answer: Text = {"prompt": await service.encode(True, lambda: served.tokenizer.decode(body.tokens))}
    return JSONResponse(answer)
