"""Prometheus metrics for /metrics. Each server has its own registry, so two in one process do not share counters."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..chat.reply import Event, Finished
from . import request_log

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """The counters, gauges and histograms of one server."""

    registry: CollectorRegistry

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        prefix = "mlx_gptoss_"
        self.requests: Counter = Counter(
            f"{prefix}requests", "Responses by path and status", ["path", "status"], registry=registry
        )
        self.prompt_tokens: Counter = Counter(f"{prefix}prompt_tokens", "Prompt tokens", registry=registry)
        self.cached_tokens: Counter = Counter(
            f"{prefix}cached_tokens", "Prompt tokens taken from the prefix cache", registry=registry
        )
        self.completion_tokens: Counter = Counter(f"{prefix}completion_tokens", "Generated tokens", registry=registry)
        self.up: Gauge = Gauge(f"{prefix}up", "1 while the engine works, 0 after it has failed", registry=registry)
        self.running: Gauge = Gauge(f"{prefix}running", "Sequences that occupy a slot", registry=registry)
        self.waiting: Gauge = Gauge(f"{prefix}waiting", "Requests waiting for a slot", registry=registry)
        self.prefix_cache_bytes: Gauge = Gauge(
            f"{prefix}prefix_cache_bytes", "Size of the prefix cache", registry=registry
        )
        self.time_to_first_token: Histogram = Histogram(
            f"{prefix}time_to_first_token_seconds",
            "From the request to its first token",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.inter_token: Histogram = Histogram(
            f"{prefix}inter_token_seconds",
            "Between consecutive events of a reply",
            buckets=INTER_TOKEN_BUCKETS_S,
            registry=registry,
        )

    def track_reply(self) -> ReplyMetrics:
        """A recorder for one reply."""
        return ReplyMetrics(self)

    def render(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class ReplyMetrics:
    """Records one reply, in the metrics and in the request log: give it each event as it arrives."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._request = request_log.current()
        self._last: float | None = None

    def record(self, event: Event) -> None:
        now = time.perf_counter()
        if self._last is not None and not isinstance(event, Finished):
            self._metrics.inter_token.observe(now - self._last)
        self._last = now
        if isinstance(event, Finished):
            self._metrics.prompt_tokens.inc(event.usage.prompt_tokens)
            self._metrics.cached_tokens.inc(event.usage.cached_tokens)
            self._metrics.completion_tokens.inc(event.usage.completion_tokens)
            self._metrics.time_to_first_token.observe(event.timings.ttft_s)
            request_log.add_reply(self._request, event)
