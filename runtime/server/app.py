"""The server as an ASGI application: its paths, and what lies around them."""

from collections.abc import Sequence

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from tilewright.compiler.errors import UserError
from tilewright.runtime.server import (
    answers,
    chat_requests,
    operations,
    requests,
    response_answers,
    response_requests,
    tokens,
)
from tilewright.runtime.server.chat import chat_completions
from tilewright.runtime.server.completions import completions
from tilewright.runtime.server.embeddings import embeddings
from tilewright.runtime.server.envelope import Envelope
from tilewright.runtime.server.errors import ApiError, respond
from tilewright.runtime.server.openapi import Endpoint, document
from tilewright.runtime.server.page import PAGE
from tilewright.runtime.server.responses import responses
from tilewright.runtime.server.service import Service
from tilewright.runtime.types import EngineError

ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "Answers a conversation.",
        body=chat_requests.ChatRequest,
        answer=answers.ChatCompletion,
        chunk=answers.ChatCompletionChunk,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        completions,
        "Continues texts.",
        body=requests.CompletionRequest,
        answer=answers.TextCompletion,
        chunk=answers.TextCompletion,
    ),
    Endpoint(
        "POST",
        "/v1/responses",
        responses,
        "Answers a conversation, in items.",
        body=response_requests.ResponseRequest,
        answer=response_answers.Response,
        chunk=response_answers.StreamedEvent,
        named=True,
    ),
    Endpoint(
        "POST",
        "/v1/embeddings",
        embeddings,
        "Texts as vectors.",
        body=requests.EmbeddingRequest,
        answer=answers.EmbeddingList,
    ),
    Endpoint("GET", "/v1/models", operations.models, "All models.", answer=answers.ModelList),
    Endpoint(
        "GET", "/v1/models/{model:path}", operations.model, "One model.", answer=answers.ModelCard, refusals=(404,)
    ),
    Endpoint(
        "POST",
        "/tokenize",
        tokens.tokenize,
        "A text or a conversation as tokens.",
        body=chat_requests.TokenizeRequest,
        answer=answers.TokenList,
    ),
    Endpoint(
        "POST",
        "/detokenize",
        tokens.detokenize,
        "Tokens as text, special ones left out.",
        body=requests.DetokenizeRequest,
        answer=answers.Text,
    ),
    Endpoint(
        "GET",
        "/health",
        operations.health,
        "Whether every engine gets on with its work.",
        answer=answers.Health,
        public=True,
        refusals=(503,),
    ),
    Endpoint(
        "GET",
        "/ready",
        operations.ready,
        "Whether requests are taken.",
        answer=answers.Health,
        public=True,
        refusals=(503,),
    ),
    Endpoint("GET", "/metrics", operations.metrics, "Metrics for Prometheus."),
    Endpoint("GET", "/figures", operations.figures, "What runs, waits and is kept right now.", answer=answers.Figures),
    Endpoint("GET", "/version", operations.version, "The server's version.", answer=answers.Version),
)
_DOCUMENT = "/openapi.json"


def create_app(service: Service, cors_origins: Sequence[str] = ()) -> Starlette:
    """cors_origins: web origins whose pages may ask; none by default."""
    open_paths = frozenset(e.path for e in ENDPOINTS if e.public)
    paths = frozenset({e.path for e in ENDPOINTS} | {_DOCUMENT} | {route.path for route in PAGE})
    around = [Middleware(Envelope, service=service, open_paths=open_paths, paths=paths)]
    if cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
        around.insert(0, cors)
    routes = [Route(e.path, e.handler, methods=[e.method]) for e in ENDPOINTS]
    routes += [Route(_DOCUMENT, operations.openapi, methods=["GET"]), *PAGE]
    refused = (ApiError, UserError, ValidationError, EngineError, HTTPException)
    app = Starlette(routes=routes, middleware=around, exception_handlers=dict.fromkeys(refused, respond))
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.openapi = document(ENDPOINTS, [served.name for served in service.models], not service.keys.open)
    return app
