"""Errors as OpenAI's API words them: {"error": {"message", "type", "param", "code"}}."""

import functools
import re
from collections.abc import Mapping

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from tilewright.compiler.errors import ContextLengthError, DeadlineError, GrammarError, QueueFullError, UserError
from tilewright.runtime.server.answers import ErrorAnswer
from tilewright.runtime.server.requests import Body
from tilewright.runtime.types import EngineError

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

# pydantic's kinds of errors that have a name of their own in OpenAI's API.
_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
    "combination": "invalid_combination",
    "unsupported": "unsupported_value",
}

# How pydantic names the alternatives of a field within a path: by type, which is no part of the request.
_ALTERNATIVE = re.compile(r"str|int|float|bool|.*[\[\]-].*")
_TAG = re.compile("system|developer|user|assistant|tool|message|function_call|function_call_output")

_MOST_CHARACTERS = 1000  # of a message


class ApiError(Exception):
    """An answer with an error's status. param: the wrong field, as messages.0.content. headers: sent with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, one_line(message), code
        self.param = None if param is None else one_line(param)
        self.headers = headers

    @property
    def body(self) -> ErrorAnswer:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def one_line(text: str) -> str:
    """A text that may hold a client's words, such as the name of a field, as one line of bounded length."""
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def too_many(message: str, wait_s: float, code: str) -> ApiError:
    """429. wait_s: after how long the same request may do."""
    return ApiError(429, message, code=code, headers={"retry-after": str(max(1, -int(-wait_s // 1)))})


def unavailable(message: str, code: str) -> ApiError:
    """503: another server may take the request at once, this one later or not at all."""
    return ApiError(503, message, code=code, headers={"retry-after": "5"})


def as_api_error(error: Exception) -> ApiError:
    """The answer that an exception stands for. What is not meant for a client becomes 500 without its words."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), code="unsupported_grammar")
    if isinstance(error, DeadlineError):
        return (
            ApiError(400, str(error), code="deadline_too_short", param="deadline_s")
            if error.retry_s is None
            else too_many(str(error), error.retry_s, "deadline_too_short")
        )
    if isinstance(error, QueueFullError):
        return too_many(str(error), 1, "queue_full")
    if isinstance(error, UserError):
        return ApiError(400, str(error), code="model_limit")
    if isinstance(error, EngineError):
        return unavailable("the engine has failed; the server ends, try another one", "engine_dead")
    if isinstance(error, HTTPException):
        return _routed(error)
    return ApiError(500, "a bug in the server; its log says more, under the id of this request", code="bug")


async def respond(request: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler."""
    answer = as_api_error(error)
    return JSONResponse(answer.body, answer.status, answer.headers)


def _invalid(error: ValidationError) -> ApiError:
    """One complaint of a validation; where a value fits no alternative of its field, that of the likeliest one: whose
    type is right, or which got furthest."""
    complaints = error.errors(include_url=False, include_input=False)
    worst = max(complaints, key=lambda c: (not c["type"].endswith("_type"), len(c["loc"])))
    path = [str(part) for i, part in enumerate(worst["loc"]) if isinstance(part, int) or not _alternative(i, part)]
    if worst["type"].startswith("union_tag"):
        path.append(worst["ctx"]["discriminator"].strip("'"))
    param, kind, words = ".".join(path) or None, worst["type"], worst["msg"][:1].lower() + worst["msg"][1:]
    if kind == "extra_forbidden":
        words = "there is no such parameter; remove it"
    elif kind == "missing":
        words = "this parameter is missing; give it"
    return ApiError(400, f"{param}: {words}" if param else words, code=_CODES.get(kind, "invalid_value"), param=param)


def _alternative(place: int, part: str) -> bool:
    """Whether a part of a path only names an alternative. A tag is never the first part: user is a field as well."""
    return bool(_ALTERNATIVE.fullmatch(part) or (place and (_TAG.fullmatch(part) or part in _model_names())))


@functools.cache
def _model_names() -> frozenset[str]:
    """Of all that a field may be."""
    found = [Body]
    for model in found:
        found += model.__subclasses__()
    return frozenset(model.__name__ for model in found)


def _routed(error: HTTPException) -> ApiError:
    """What the router refuses."""
    if error.status_code == 404:
        return ApiError(404, "there is nothing at this path; /openapi.json lists what is", code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"this path takes {allowed} only"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)
