"""What operators ask: health, readiness, metrics, version; and which models there are."""

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tilewright import __version__
from tilewright.runtime.server.answers import Figures, Health, ModelFigures, ModelList, Version
from tilewright.runtime.server.metrics import CONTENT_TYPE
from tilewright.runtime.server.served import Served
from tilewright.runtime.server.service import Service


async def health(http: Request) -> JSONResponse:
    """200 while every engine gets on with its work, else 503: start the server again."""
    state = http.app.state.service.health
    answer: Health = {"status": state}
    return JSONResponse(answer, 200 if state == "ok" else 503)


async def ready(http: Request) -> JSONResponse:
    """200 while requests are taken, else 503: send them elsewhere."""
    service: Service = http.app.state.service
    answer: Health = {"status": "draining" if service.draining else service.health}
    return JSONResponse(answer, 200 if answer["status"] == "ok" else 503)


async def metrics(http: Request) -> Response:
    return Response(http.app.state.service.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def figures(http: Request) -> JSONResponse:
    """A few of the metrics as JSON, for the page at / and whoever wants no Prometheus."""
    answer: Figures = {
        "time_s": time.monotonic(),
        "models": [_figures(served) for served in http.app.state.service.models],
    }
    return JSONResponse(answer)


def _figures(served: Served) -> ModelFigures:
    load, stats = served.engine.load, served.engine.stats
    return {
        "model": served.name,
        "running": load.running,
        "waiting": load.waiting,
        "pages": load.pages,
        "used_pages": load.used_pages,
        "kept_pages": load.kept_pages,
        "generation_tokens": stats.drawn,
        "prefix_cache_queries": stats.prefix_queries,
        "prefix_cache_hits": stats.prefix_hits,
    }


async def version(_: Request) -> JSONResponse:
    answer: Version = {"version": __version__}
    return JSONResponse(answer)


async def models(http: Request) -> JSONResponse:
    answer: ModelList = {"object": "list", "data": [served.card for served in http.app.state.service.models]}
    return JSONResponse(answer)


async def model(http: Request) -> JSONResponse:
    return JSONResponse(http.app.state.service.models.find(http.path_params["model"]).card)


async def openapi(http: Request) -> JSONResponse:
    return JSONResponse(http.app.state.openapi)
