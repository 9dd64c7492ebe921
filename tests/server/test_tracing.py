"""Traces: a span a request, by the conventions, without a word of what was said."""

import sys

import pytest

from tests.server.serving import receive_until, running, wait_until
from tilewright.compiler.errors import UserError
from tilewright.runtime.server.tracing import Tracer, otlp_tracer

pytestmark = pytest.mark.timeout(60)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_span_a_request_under_the_clients() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    with running(tracer=Tracer(spans, batch=False)) as server:
        server.chat({"traceparent": PARENT}, messages=[{"role": "user", "content": "secret"}], ignore_eos=True)
        server.chat({"traceparent": "nonsense"}, n=0)
        server.ask("GET", "/version")
        server.model.step_s = 0.01
        server.model.broken = True
        assert server.chat()[0] == 503
    good, bad, dead = spans.get_finished_spans()
    assert good.name == "chat fake" and good.kind.name == "SERVER" and 0 < good.end_time - good.start_time < 20e9
    assert f"{good.context.trace_id:032x}" in PARENT and f"{good.parent.span_id:016x}" in PARENT
    said = dict(good.attributes)
    assert said.pop("gen_ai.usage.input_tokens") > 0 and 0 < said.pop("tilewright.time_to_first_token_s") < 20
    assert said == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "tilewright", "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake", "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.output_tokens": 4, "http.request.method": "POST", "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }  # fmt: skip
    assert bad.parent is None and bad.attributes["http.response.status_code"] == 400 and bad.status.is_unset
    assert dead.attributes["error.type"] == "503" and not dead.status.is_ok
    assert "secret" not in "".join(span.to_json() for span in (good, bad, dead))


def test_a_stream_that_breaks_after_its_status_is_an_error() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    with running(tracer=Tracer(spans, batch=False)) as server:
        server.chat(stream=True)
        server.model.step_s = 0.01
        left = server.open_stream()
        receive_until(left, b'"delta":{"content"')
        left.close()
        wait_until(lambda: len(spans.get_finished_spans()) == 2)
        broken = server.open_stream()
        server.model.broken = True
        assert b'"code":"engine_dead"' in receive_until(broken, b"}}\n\n\r\n0\r\n\r\n")
        wait_until(lambda: len(spans.get_finished_spans()) == 3)
    whole, left_span, broken_span = spans.get_finished_spans()
    assert whole.status.is_unset and "error.type" not in whole.attributes
    for span, error in ((left_span, "disconnected"), (broken_span, "engine_dead")):
        assert span.attributes["http.response.status_code"] == 200
        assert span.attributes["error.type"] == error and span.status.status_code.name == "ERROR"
    assert left_span.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert 0 < left_span.attributes["gen_ai.usage.output_tokens"] < 400
    assert "gen_ai.response.finish_reasons" not in broken_span.attributes, "it has not finished"


def test_a_collector_that_is_gone_delays_nobody() -> None:
    with running(tracer=otlp_tracer("http://127.0.0.1:9")) as server:
        assert server.chat()[0] == 200


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "ftp://a", "http://"])
def test_endpoints_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="is no URL of http or https"):
        otlp_tracer(url)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(UserError, match=r"pip install 'tilewright\[otel\]'"):
        otlp_tracer("http://127.0.0.1:4318")
