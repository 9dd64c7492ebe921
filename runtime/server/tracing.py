"""OpenTelemetry traces: a span a request, under the client's own where it sends a traceparent (W3C Trace Context).

Attributes have the names of OpenTelemetry's semantic conventions for generative AI and HTTP; nothing of what was said
is in them. A span is made when its request has ended, with the times that it had, so that a request in progress costs
nothing. Spans leave in batches, from a thread; a collector that is gone loses spans and delays nobody.
"""

import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tilewright import __version__
from tilewright.compiler.errors import UserError

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_EXTRA = "opentelemetry"
_EXPORT_S = 2.0  # for a batch on its way, and for the last one when the server ends
_NAMES = {
    "model": "gen_ai.response.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "first_token_s": "tilewright.time_to_first_token_s",
}


class Tracer:
    """Sends spans to `exporter`, one of opentelemetry.sdk.trace.export. batch: from a thread, as a server does."""

    def __init__(self, exporter: Any, batch: bool = True) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "tilewright", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor((BatchSpanProcessor if batch else SimpleSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("tilewright.server", __version__)
        self._parents = TraceContextTextMapPropagator()

    def record(
        self, path: str, status: int, traceparent: str | None, begun_ns: int, ended_ns: int, notes: Mapping[str, Any]
    ) -> None:
        """A request to one of OPERATIONS that has ended. notes: what its line in the log says; times since 1970."""
        from opentelemetry.trace import SpanKind, StatusCode

        operation, model = OPERATIONS[path], notes.get("model")
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "tilewright",
            "http.request.method": "POST",
            "http.route": path,
            "http.response.status_code": status,
            **{name: notes[note] for note, name in _NAMES.items() if note in notes},
        }
        if model is not None:
            attributes["gen_ai.request.model"] = model
        parent = self._parents.extract({"traceparent": traceparent}) if traceparent else None
        name = operation if model is None else f"{operation} {model}"
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=begun_ns)
        error = _error(status, notes)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(StatusCode.ERROR)
        span.end(ended_ns)

    def close(self) -> None:
        """Sends what is left, and waits for it no longer than a moment."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_EXPORT_S)


def _error(status: int, notes: Mapping[str, Any]) -> str | None:
    """What kept an answer from its end. One that had begun has status 200 all the same."""
    if "failed" in notes:
        return str(notes["failed"])
    if notes.get("disconnected"):
        return "disconnected"
    return str(status) if status >= 500 else None


def otlp_tracer(endpoint: str) -> Tracer:
    """Sends spans to an OTLP collector: http://HOST:4318, or the whole URL of its traces. Raises UserError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--otlp-endpoint {endpoint!r} is no URL of http or https; give one, as http://127.0.0.1:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != _EXTRA:
            raise
        raise UserError("OpenTelemetry is not installed; pip install 'tilewright[otel]'") from None
    url = endpoint if parts.path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
    return Tracer(OTLPSpanExporter(endpoint=url, timeout=_EXPORT_S))
