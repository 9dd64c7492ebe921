"""Prometheus metrics, under the names that dashboards for LLM servers know.

The names and labels are vLLM's with `tilewright:` before them; with the prefix `vllm` its dashboards work as they are.
What the engine counts is read when somebody looks; what happens to one request is observed as it happens.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from tilewright.runtime.server.served import Models, Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class ServerMetrics:
    """Histograms of requests, labelled with their model, and all counts of the engines."""

    def __init__(self, models: Models, prefix: str = "tilewright") -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(models, prefix))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{prefix}:{name}", text, ["model_name"], registry=self.registry, buckets=buckets)

        self.first_token = histogram("time_to_first_token_seconds", "Submission to first token.", _FIRST_S)
        self.between_tokens = histogram("inter_token_latency_seconds", "One token of a stream to the next.", _BETWEEN_S)
        self.whole = histogram("e2e_request_latency_seconds", "Submission to the end.", _WHOLE_S)
        self.queue = histogram("request_queue_time_seconds", "Submission to first step.", _WHOLE_S)
        self.prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.prompt_tokens = Counter(
            f"{prefix}:prompt_tokens", "Tokens of all prompts.", ["model_name"], registry=self.registry
        )
        self.ended = Counter(
            f"{prefix}:request_success",
            "Samples that ended, by how.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.http = Counter(f"{prefix}:http_requests", "Answered requests.", ["path", "status"], registry=self.registry)

    def text(self) -> bytes:
        """In Prometheus's exposition format."""
        return generate_latest(self.registry)


class _Engines(Collector):
    """Reads every engine's own counts."""

    def __init__(self, models: Models, prefix: str) -> None:
        self._models, self._prefix = models, prefix

    def collect(self) -> Iterator[Metric]:
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=["model_name"])
            for served in self._models:
                gauge.add_metric([served.name], read(served))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=["model_name"])
            for served in self._models:
                counter.add_metric([served.name], read(served))
            yield counter
        steps = SummaryMetricFamily(f"{self._prefix}:step_seconds", "Steps, launch to result.", labels=["model_name"])
        for served in self._models:
            stats = served.engine.stats
            steps.add_metric([served.name], count_value=stats.steps, sum_value=stats.step_s)
        yield steps


def _page_share(served: Served) -> float:
    load = served.engine.load
    return load.used_pages / load.pages


_GAUGES = (
    ("num_requests_running", "Sequences in the batch.", lambda s: s.engine.load.running),
    ("num_requests_waiting", "Sequences that wait.", lambda s: s.engine.load.waiting),
    ("kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", _page_share),
)
_COUNTERS = (
    ("num_preemptions", "Sequences that gave up their pages.", lambda s: s.engine.stats.preemptions),
    ("computed_tokens", "Tokens of prompts and answers that steps computed.", lambda s: s.engine.stats.tokens),
    ("generation_tokens", "Tokens drawn.", lambda s: s.engine.stats.drawn),
    ("engine_restarts", "Engines that were started in place of a dead one.", lambda s: s.restarts),
    ("prefix_cache_queries", "Tokens of prompts that were looked for.", lambda s: s.engine.stats.prefix_queries),
    ("prefix_cache_hits", "Tokens of prompts that were in the cache.", lambda s: s.engine.stats.prefix_hits),
)
