"""The page at /: three files written by hand, which ask the same API as everybody else.

It needs a key as every path does: with keys it is for those whose proxy sends theirs along.
"""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    # Nothing from elsewhere, and in nobody's frame: what a model says is text and stays text.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def _serve(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = files(__name__).joinpath(name).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, headers={**_HEADERS, "content-type": kind})

    return answer


PAGE = [Route(path, _serve(name, kind), methods=["GET"]) for path, (name, kind) in _FILES.items()]
