"""What /metrics shows, for Prometheus. Decides names and labels; leaves counting to whoever does what is counted.

Labels take few values: a route is its pattern, an endpoint is one of the endpoint files. Numbers read from Redis (mixtral_queue_*,
mixtral_jobs_ended, mixtral_tokens) are the same at every replica: take max() over replicas, not sum().
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


@dataclass(frozen=True)
class QueueNumbers:
    """One endpoint's numbers as Redis holds them."""

    waiting: int
    running: int
    workers: int
    users_waiting: int
    unsaved_usage: int
    dead_letters: int
    tokens: int
    ended: Mapping[str, int] = field(default_factory=dict)


class _QueueCollector(Collector):
    """Shows the numbers that were read from Redis for this very scrape; an endpoint that could not be read is left out."""

    def __init__(self) -> None:
        self.numbers: dict[str, QueueNumbers] = {}

    def collect(self) -> Iterable[Metric]:
        for name, sentence in (
            ("waiting", "jobs that wait for a worker"),
            ("running", "jobs that a worker holds"),
            ("workers", "worker sessions with a lease"),
            ("users_waiting", "users with a waiting job"),
            ("unsaved_usage", "finished jobs that the database has not yet"),
            ("dead_letters", "jobs given up because every worker that held them died"),
        ):
            gauge = GaugeMetricFamily(f"mixtral_queue_{name}", sentence, labels=["endpoint"])
            for endpoint, numbers in self.numbers.items():
                gauge.add_metric([endpoint], getattr(numbers, name))
            yield gauge
        tokens = CounterMetricFamily("mixtral_tokens", "tokens that workers appended", labels=["endpoint"])
        ended = CounterMetricFamily("mixtral_jobs_ended", "jobs by how they ended", labels=["endpoint", "state"])
        for endpoint, numbers in self.numbers.items():
            tokens.add_metric([endpoint], numbers.tokens)
            for state, count in numbers.ended.items():
                ended.add_metric([endpoint, state], count)
        yield tokens
        yield ended


class Metrics:
    """One registry per server, so that two servers in one process do not share counts."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._queue = _QueueCollector()
        registry.register(self._queue)
        self.requests = Counter("mixtral_http_requests", "requests answered", ["method", "route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "mixtral_http_request_seconds", "from a request's head to the end of its answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self.open_streams = Gauge("mixtral_open_streams", "event streams open now", ["wire"], registry=registry)
        self.first_token_seconds = Histogram(
            "mixtral_first_token_seconds", "from an OpenAI call to its first token", ["endpoint"], buckets=_SECONDS, registry=registry
        )
        self.tokens_sent = Counter("mixtral_tokens_sent", "tokens sent to readers of this replica", ["wire"], registry=registry)
        self.jobs_put = Counter("mixtral_jobs_put", "jobs queued by this replica", ["endpoint"], registry=registry)
        self.readers_dropped = Counter("mixtral_readers_dropped", "readers cut off because they took nothing", registry=registry)
        self.jobs_abandoned = Counter(
            "mixtral_jobs_abandoned", "jobs cancelled because the client of their call was gone", registry=registry
        )
        self.connections = Gauge("mixtral_connections", "open connections", registry=registry)
        self.connections_refused = Counter("mixtral_connections_refused", "connections closed unanswered", ["why"], registry=registry)
        self.loop_lag_seconds = Gauge("mixtral_loop_lag_seconds", "how late the event loop was at its latest look", registry=registry)
        self.loop_blocked = Counter("mixtral_loop_blocked", "times the event loop stood still for more than 100 ms", registry=registry)
        self.ledger_saved = Counter("mixtral_ledger_saved", "finished jobs saved to the database by this replica", registry=registry)
        self.upkeep_failures = Counter("mixtral_upkeep_failures", "rounds of a background task that failed", ["task"], registry=registry)
        self.redis_up = Gauge("mixtral_redis_up", "1 when Redis answered this scrape", registry=registry)

    def render(self, queues: Mapping[str, QueueNumbers]) -> bytes:
        """The text of one scrape. queues: what Redis said just now, by endpoint."""
        self._queue.numbers = dict(queues)
        return generate_latest(self._registry)
