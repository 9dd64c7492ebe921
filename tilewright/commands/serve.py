"""`tilewright serve`: models behind OpenAI's API."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tilewright.commands.sampling import Threads

_EXTRA = ("starlette", "uvicorn", "pydantic", "prometheus_client")


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]ARTIFACT_OR_MODEL...", help="What to serve; NAME is what clients ask for, else its own."
        ),
    ],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every one of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON list of keys' digests and limits; see docs/serving.md.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="A certificate (PEM): serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="The certificate's private key (PEM).")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web pages of this origin may ask; may be repeated.")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 256,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt; what the model reads by default.")
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; what the context leaves by default.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Longest body of a request.")] = 4 << 20,
    max_connections: Annotated[int, typer.Option(min=1, help="Most open sockets.")] = 2048,
    request_seconds: Annotated[float, typer.Option(min=0.001, help="A request's answer is cut after so long.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="What runs may finish for so long after SIGTERM.")] = 30.0,
    stall_seconds: Annotated[
        float, typer.Option(min=0.001, help="/health turns red after so long without a step.")
    ] = 60.0,
    log_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Where logs go; stderr by default.")] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what clients ask, too.")] = False,
    metrics_prefix: Annotated[
        str, typer.Option(metavar="NAME", help="Of metrics; with vllm its dashboards work as they are.")
    ] = "tilewright",
    no_prefix_cache: Annotated[
        bool, typer.Option("--no-prefix-cache", help="Compute every prompt from its first token.")
    ] = False,
    max_stretch: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Prompts make steps of running streams at most so many times longer; 0: no limit. By default 1.6 on "
            "a CPU and 0 on a GPU.",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Replace an engine that dies, on a CPU; else the process ends with 1.")
    ] = False,
    otlp_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Send OpenTelemetry traces there, as OTLP over HTTP.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Serve models by OpenAI's API, until SIGTERM."""
    from tilewright.compiler import env
    from tilewright.compiler.errors import UserError

    try:
        from tilewright.runtime.server import lifecycle, memory
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise UserError(f"{error.name} is not installed; pip install 'tilewright[serve]'") from None
    from tilewright import console
    from tilewright.runtime.server.app import create_app
    from tilewright.runtime.server.keys import KeyRing, plain_keys, read_keys
    from tilewright.runtime.server.limits import ServerLimits
    from tilewright.runtime.server.logs import log, logging_to
    from tilewright.runtime.server.service import Service
    from tilewright.runtime.server.tracing import otlp_tracer
    from tilewright.runtime.types import EngineLimits
    from tilewright.session import open_served

    limits = ServerLimits(
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
        request_s=request_seconds,
        drain_s=drain_seconds,
        stall_s=stall_seconds,
    )
    keys = KeyRing([*([] if api_keys is None else read_keys(api_keys)), *plain_keys(env.api_keys())])
    if (tls_cert is None) != (tls_key is None):
        raise UserError("--tls-cert and --tls-key go together; give both or none")
    tls = None if tls_cert is None or tls_key is None else lifecycle.Tls(tls_cert, tls_key)
    if tls is not None:
        tls.check()
    tracer = None if otlp_endpoint is None else otlp_tracer(otlp_endpoint)
    bound = lifecycle.bind(host, port)
    engine_limits = EngineLimits(
        max_queue=max_queue,
        max_prompt=max_prompt_tokens,
        max_answer=max_output_tokens,
        keep_prefixes=not no_prefix_cache,
        max_stretch=max_stretch,
    )
    with bound, logging_to(log_file):
        served = open_served(models, threads, engine_limits, restart)
        service = Service.of(
            served, limits, keys, log_prompts=log_prompts, metrics_prefix=metrics_prefix, tracer=tracer
        )
        server = lifecycle.Server(create_app(service, cors_origin or ()), service, bound, tls)
        where = f"{'https' if tls else 'http'}://{host if ':' not in host else f'[{host}]'}:{bound.getsockname()[1]}"
        log("serving", url=where, models=[each.name for each in served], keys=not keys.open)
        console.note(f"serving {', '.join(each.name for each in served)} at {where}")
        if keys.open and host not in ("127.0.0.1", "::1", "localhost"):
            console.warn("anybody who reaches this address may ask; give --api-keys")
        memory.settle()
        code = server.run()
    lifecycle.leave(code)
    sys.exit(code)
