"""/v1/embeddings: texts as vectors, the model's hidden states pooled as its manifest says, of length 1."""

import base64
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tilewright.runtime.request import Request
from tilewright.runtime.server.answers import Embedding, EmbeddingList
from tilewright.runtime.server.body import read
from tilewright.runtime.server.errors import ApiError, unavailable
from tilewright.runtime.server.generation import admit, submit
from tilewright.runtime.server.requests import EmbeddingRequest
from tilewright.runtime.server.served import Served
from tilewright.runtime.server.service import Service
from tilewright.runtime.types import Completion, SamplingParams

_AT_ONCE = 32  # texts in the engine's queue, which others share
_LEAST_S = 1e-6  # a deadline that is over at once
_LONG = 16384  # numbers that are written beside the event loop


async def embeddings(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    body = await read(http, EmbeddingRequest, service.limits)
    served = service.models.find(body.model)
    most_s = service.limits.request_s
    params = SamplingParams(deadline_s=min(body.deadline_s or most_s, most_s), priority=body.priority or 0)
    _check_dimensions(served, body.dimensions)
    requests = await admit(service, http, served, body.inputs, params, served.engine.embedding)
    vectors: list[np.ndarray] = []
    end_s = time.monotonic() + (params.deadline_s or most_s)
    for some in _parts(requests, min(_AT_ONCE, served.engine.limits.max_queue)):
        left_s = end_s - time.monotonic()
        for request in some:
            request.params = replace(params, deadline_s=max(left_s, _LEAST_S))
        async with await submit(service, http, served, some) as generation:
            vectors += [_vector(done) for done in await generation.completions()]
    tokens = sum(request.prompt_tokens for request in requests)
    form = _base64 if body.encoding_format == "base64" else _numbers
    text = await service.encode(sum(map(len, vectors)) > _LONG, lambda: _text(served.name, vectors, form, tokens))
    return Response(text, media_type="application/json")


def _check_dimensions(served: Served, asked: int | None) -> None:
    have = served.engine.dimensions
    if asked is not None and have is not None and asked != have:
        message = f"dimensions {asked} is not {have}, what this model's embeddings have; leave it out"
        raise ApiError(400, message, code="model_limit", param="dimensions")


def _parts(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def _vector(done: Completion) -> np.ndarray:
    if done.embedding is not None:
        return done.embedding
    if done.finish_reason == "deadline":
        message = "the time was over before the texts were computed; send fewer, or allow more"
        raise ApiError(408, message, code="deadline")
    raise unavailable("the server is about to end; send the request to another one", "draining")


Form = Callable[[np.ndarray], list[float] | str]


def _text(model: str, vectors: Sequence[np.ndarray], form: Form, tokens: int) -> str:
    """The answer as JSON, written vector by vector, so that other threads get their turn."""
    items: list[Embedding] = [
        {"object": "embedding", "index": i, "embedding": form(vector)} for i, vector in enumerate(vectors)
    ]
    frame: EmbeddingList = {
        "object": "list",
        "data": [],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    written = ", ".join(json.dumps(item) for item in items)
    return json.dumps(frame).replace('"data": []', f'"data": [{written}]', 1)


def _numbers(vector: np.ndarray) -> list[float]:
    return vector.tolist()


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
