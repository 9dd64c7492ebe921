"""The OpenAPI document, made from the table of endpoints and the types that the server checks and answers with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import TypeAdapter

from tilewright import __version__
from tilewright.runtime.server.answers import ErrorAnswer, Json
from tilewright.runtime.server.requests import Body

# What a request with a body may be refused with beside 401 and 429.
_BODY_REFUSALS = (400, 403, 404, 408, 413, 415, 503)
_REFERENCE = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Endpoint:
    """One path. handler: as Starlette takes it. body, answer, chunk: types of what comes in, goes out, and goes out as
    the events of a stream, which are `named` or end with [DONE]; an answer of None is text. public: needs no key.
    refusals: statuses of errors."""

    method: str
    path: str
    handler: Callable[..., Any]
    summary: str
    body: type[Body] | None = None
    answer: Any = None
    chunk: Any = None
    named: bool = False
    public: bool = False
    refusals: tuple[int, ...] = ()

    @property
    def statuses(self) -> list[int]:
        keyed = () if self.public else (401, 429)
        return sorted({*self.refusals, *keyed, *(_BODY_REFUSALS if self.body else ())})


def document(endpoints: Sequence[Endpoint], models: Sequence[str], keyed: bool) -> Json:
    """An OpenAPI 3.2 document: earlier versions have no words for the events of a stream.

    models: the names that are served. keyed: whether there are API keys.
    """
    types = {t for e in endpoints for t in (e.body, e.answer, e.chunk) if t is not None} | {ErrorAnswer}
    adapters = [(t, "validation", TypeAdapter(t)) for t in sorted(types, key=lambda t: getattr(t, "__name__", str(t)))]
    schemas, shared = TypeAdapter.json_schemas(adapters, ref_template=_REFERENCE)  # type: ignore[arg-type]
    references = {t: schemas[(t, "validation")] for t in types}
    components = shared["$defs"]
    for schema in components.values():
        name = schema.get("properties", {}).get("model", {})
        if "minLength" in name:  # of a request
            name["enum"] = list(models)
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path}", "}")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, references, models, keyed)
    result: Json = {
        "openapi": "3.2.0",
        "info": {"title": "Tilewright", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": components},
    }
    if keyed:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return result


_ABOUT = (
    "OpenAI's API for the models of this server. Fields that OpenAI does not have are marked as extensions. "
    "A field that is not listed is refused."
)


def _event(chunk: Json, named: bool) -> Json:
    """The schema of one event of a stream."""
    said = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [chunk, {"$ref": _REFERENCE.format(model="ErrorAnswer")}]},
        "description": "A chunk; an error, and nothing after it, where the engine fails.",
    }
    event = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, said]}}}
    if named:
        event["properties"] = {"event": {"type": "string", "description": "The chunk's type."}, "data": said}
    return event


def _operation(endpoint: Endpoint, references: dict[Any, Json], models: Sequence[str], keyed: bool) -> Json:
    content: Json = {"application/json": {"schema": references[endpoint.answer]}} if endpoint.answer else {}
    if endpoint.answer is None:
        content["text/plain"] = {"schema": {"type": "string"}}
    if endpoint.chunk is not None:
        content["text/event-stream"] = {"itemSchema": _event(references[endpoint.chunk], endpoint.named)}
    responses: Json = {"200": {"description": "Done.", "content": content}}
    failed = references[endpoint.answer] if endpoint.public else references[ErrorAnswer]
    for status in endpoint.statuses:
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": failed}},
        }
    operation: Json = {"summary": endpoint.summary, "operationId": endpoint.handler.__name__, "responses": responses}
    if endpoint.body is not None:
        body = {"application/json": {"schema": references[endpoint.body]}}
        operation["requestBody"] = {"required": True, "content": body}
    if "{model" in endpoint.path:
        schema = {"type": "string", "enum": list(models)}
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": schema}]
    if keyed and not endpoint.public:
        operation["security"] = [{"key": []}]
    return operation
