"""The server's numbers for Prometheus.

Owns: their names, and when a request counts. Does not own: the engine's counters (``Engine.counters``), which are
read when metrics are asked for. Invariant: a request counts once, when its response has ended, streams included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from steerlm_megatron.generate.engine import Engine
from steerlm_megatron.generate.job import Handle

_HELP = {
    "running": "Sequences being generated",
    "waiting": "Requests waiting for a row",
    "cache_tokens": "Tokens in the KV cache",
    "steps_total": "Engine steps",
    "sampled_tokens_total": "Tokens sampled",
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class _EngineCollector:
    """Prometheus collector of whatever the engine counts: names that end in ``_total`` are counters, others gauges."""

    def __init__(self, generator: Engine) -> None:
        self.generator = generator

    def collect(self) -> Iterator[Metric]:
        for name, value in self.generator.counters().items():
            told = _HELP.get(name, name.removesuffix("_total").replace("_", " ").capitalize())
            if name.endswith("_total"):
                yield CounterMetricFamily(f"steerlm_{name.removesuffix('_total')}", told, value=value)
            else:
                yield GaugeMetricFamily(f"steerlm_{name}", told, value=value)


class Metrics:
    """What the server counts by itself, and the engine's counters beside it."""

    def __init__(self, generator: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(generator))
        self.requests = Counter("steerlm_requests", "HTTP requests", ["endpoint", "status"], registry=self.registry)
        self.rejected = Counter("steerlm_rejected_requests", "Requests refused", ["reason"], registry=self.registry)
        self.left = Counter("steerlm_clients_left", "Clients that left before their answer", registry=self.registry)
        self.finished = Counter("steerlm_finished", "Responses by how they ended", ["reason"], registry=self.registry)
        self.prompt_tokens = Counter("steerlm_prompt_tokens", "Prompt tokens taken in", registry=self.registry)
        self.seconds = self._histogram("request_seconds", "Time to the end of the answer", _SECONDS, ["endpoint"])
        self.queue_seconds = self._histogram("queue_seconds", "Time until a response began to be generated", _SECONDS)
        self.first_token_seconds = self._histogram("time_to_first_token_seconds", "Time to the first token", _SECONDS)
        self.token_seconds = self._histogram("inter_token_seconds", "Mean time between tokens of a response", _GAPS)
        self.longest_gap = self._histogram("longest_inter_token_seconds", "Longest such time of a response", _GAPS)
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.response_length = self._histogram("response_tokens", "Tokens of a response", _TOKENS)

    def _histogram(self, name: str, told: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"steerlm_{name}", told, labels, registry=self.registry, buckets=buckets)

    def prompts(self, lengths: Sequence[int]) -> None:
        """Count the prompts of a request that was taken in."""
        self.prompt_tokens.inc(sum(lengths))
        for length in lengths:
            self.prompt_length.observe(length)

    def responses(self, handles: Sequence[Handle]) -> None:
        """Count responses, of which some may have been cut short."""
        for handle in handles:
            times, result = handle.times, handle.result
            if times.began is not None:
                self.queue_seconds.observe(times.began - times.submitted)
            if times.first_token is not None:
                self.first_token_seconds.observe(times.first_token - times.submitted)
            if times.tokens > 1 and times.first_token is not None and times.last_token is not None:
                self.token_seconds.observe((times.last_token - times.first_token) / (times.tokens - 1))
                self.longest_gap.observe(times.longest_gap)
            self.finished.labels("error" if result is None else result.finish_reason).inc()
            if result is not None:
                self.response_length.observe(result.completion_tokens)
