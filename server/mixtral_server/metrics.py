"""What /metrics shows, for Prometheus. Decides names and labels; leaves counting to whoever does what is counted.

Labels take few values: a route is its pattern, an endpoint is one of the endpoint files. Numbers read from Redis (mixtral_queue_*,
mixtral_jobs_ended, mixtral_tokens, mixtral_worker_*) are the same at every replica: take max() over replicas, not sum(). Processes that
share a port are told apart by a label: whichever of them answers shows the numbers of all.
"""

from __future__ import annotations

import math
from collections import Counter as Counts
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

MOST_WORKERS = 256  # of an endpoint, shown one by one
_NO_COUNT_REACHES = 1e300
_STEP_PARTS = ("schedule", "broadcast", "forward", "sample", "detokenise")
_WORKER_GAUGES = {
    "running": "chats in the batch now",
    "waiting": "chats in the worker that wait for a slot or for blocks",
    "slots": "most chats in the batch",
    "kv_blocks_used": "KV blocks that chats hold",
    "kv_blocks_kept": "KV blocks that a prompt with the same beginning would find",
    "kv_blocks": "KV blocks in all",
    "tokens_per_s": "tokens generated per second over the last ten seconds",
    "steps_per_s": "steps per second over the last ten seconds",
    "bandwidth_share": "share of the devices' memory bandwidth that forward passes of the last ten seconds reached",
    "expert_imbalance": "busiest expert over the mean one in the last ten seconds, averaged over layers; 0 without tokens",
    "device_bytes_per_s": "bytes per second that the worker's devices can read; 0 if unknown",
}
_WORKER_COUNTERS = {
    "tokens_total": "tokens generated since the worker started",
    "jobs_total": "jobs taken since the worker started",
    "failed_total": "jobs that failed in the worker since it started",
    "prompt_tokens_total": "prompt tokens that entered the batch",
    "reused_tokens_total": "prompt tokens that were found in the cache instead of computed",
    "preemptions_total": "chats that gave up their slot or blocks for others",
    "steps_total": "forward passes since the worker started",
    "step_rows_total": "chats in those passes; divided by their number, the mean batch",
    "step_tokens_total": "tokens fed in those passes",
    "step_bytes_total": "bytes of weights and KV cache that those passes had to read",
}


@dataclass(frozen=True)
class QueueNumbers:
    """One endpoint's numbers as Redis holds them."""

    waiting: int
    waiting_tokens: int
    running: int
    workers: int
    users_waiting: int
    unsaved_usage: int
    dead_letters: int
    tokens: int
    ended: Mapping[str, int] = field(default_factory=dict)
    eta_errors_within: Mapping[float, int] = field(default_factory=dict)  # bound in seconds → starts, cumulative
    eta_errors_sum_s: float = 0.0
    eta_late: int = 0


@dataclass(frozen=True)
class WorkerNumbers:
    """What one worker with a lease says of itself. Its words are not ours: only known names with finite numbers are shown."""

    endpoint: str
    name: str
    telemetry: Mapping[str, Any]

    def number(self, field: str) -> float | None:
        value = self.telemetry.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _NO_COUNT_REACHES:
            return None
        return float(value)


class _WorkerCollector(Collector):
    """Shows the workers that held a lease at this very scrape; one that is gone is shown no more."""

    def __init__(self) -> None:
        self.workers: Sequence[WorkerNumbers] = ()

    def collect(self) -> Iterable[Metric]:
        named = list(zip(self.workers, _labels(self.workers), strict=True))
        for kind, names in ((GaugeMetricFamily, _WORKER_GAUGES), (CounterMetricFamily, _WORKER_COUNTERS)):
            for name, sentence in names.items():
                metric = kind(f"mixtral_worker_{name.removesuffix('_total')}", sentence, labels=["endpoint", "worker"])
                for worker, label in named:
                    if (number := worker.number(name)) is not None:
                        metric.add_metric([worker.endpoint, label], number)
                yield metric
        parts = CounterMetricFamily(
            "mixtral_worker_step_seconds", "time that steps took since the worker started, by part", labels=["endpoint", "worker", "part"]
        )
        for worker, label in named:
            for part in _STEP_PARTS:
                if (number := worker.number(f"{part}_s_total")) is not None:
                    parts.add_metric([worker.endpoint, label, part], number)
        yield parts


def _labels(workers: Sequence[WorkerNumbers]) -> list[str]:
    """One label each: the worker's name, and for the second of a name its number. Never the session, which is another after each login."""
    seen: Counts[tuple[str, str]] = Counts()
    labels = []
    for worker in workers:
        seen[worker.endpoint, worker.name] += 1
        count = seen[worker.endpoint, worker.name]
        labels.append(worker.name if count == 1 else f"{worker.name} #{count}")
    return labels


class _QueueCollector(Collector):
    """Shows the numbers that were read from Redis for this very scrape; an endpoint that could not be read is left out."""

    def __init__(self) -> None:
        self.numbers: dict[str, QueueNumbers] = {}

    def collect(self) -> Iterable[Metric]:
        for name, sentence in (
            ("waiting", "jobs that wait for a worker"),
            ("waiting_tokens", "tokens that waiting jobs ask for, as estimated"),
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
        yield from self._etas()

    def _etas(self) -> Iterable[Metric]:
        errors = HistogramMetricFamily(
            "mixtral_queue_eta_error_seconds", "between a job's start and the ETA it was told when it was put", labels=["endpoint"]
        )
        late = CounterMetricFamily(
            "mixtral_queue_eta_late", "jobs that started after the 90th percentile they were told", labels=["endpoint"]
        )
        for endpoint, numbers in self.numbers.items():
            buckets = [("+Inf" if bound == math.inf else str(bound), count) for bound, count in numbers.eta_errors_within.items()]
            errors.add_metric([endpoint], buckets or [("+Inf", 0)], numbers.eta_errors_sum_s)
            late.add_metric([endpoint], numbers.eta_late)
        yield errors
        yield late


class Metrics:
    """One registry per server, so that two servers in one process do not share counts."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._of_this_scrape = of_this_scrape = CollectorRegistry()  # read for it from Redis, and the same at every process
        self._queue = _QueueCollector()
        self._workers = _WorkerCollector()
        of_this_scrape.register(self._queue)
        of_this_scrape.register(self._workers)
        self.requests = Counter("mixtral_http_requests", "requests answered", ["method", "route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "mixtral_http_request_seconds", "from a request's head to the end of its answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self.open_streams = Gauge("mixtral_open_streams", "event streams open now", ["wire"], registry=registry)
        self.first_token_seconds = Histogram(
            "mixtral_first_token_seconds", "from an OpenAI call to its first token", ["endpoint"], buckets=_SECONDS, registry=registry
        )
        self.tokens_sent = Counter("mixtral_tokens_sent", "tokens sent to readers of this replica", ["wire"], registry=registry)
        self.jobs_put = Counter("mixtral_jobs_put", "jobs queued by this replica", ["endpoint"], registry=registry)
        self.readers_dropped = Counter("mixtral_readers_dropped", "readers cut off because they took nothing", registry=registry)
        self.offences = Counter("mixtral_offences", "what only a broken or hostile worker sends", ["kind"], registry=registry)
        self.jobs_abandoned = Counter(
            "mixtral_jobs_abandoned", "jobs cancelled because the client of their call was gone", registry=registry
        )
        self.connections = Gauge("mixtral_connections", "open connections", registry=registry)
        self.connections_refused = Counter("mixtral_connections_refused", "connections closed unanswered", ["why"], registry=registry)
        self.loop_lag_seconds = Gauge("mixtral_loop_lag_seconds", "how late the event loop was at its latest look", registry=registry)
        self.loop_blocked = Counter("mixtral_loop_blocked", "times the event loop stood still for more than 100 ms", registry=registry)
        self.ledger_saved = Counter("mixtral_ledger_saved", "finished jobs saved to the database by this replica", registry=registry)
        self.upkeep_failures = Counter("mixtral_upkeep_failures", "rounds of a background task that failed", ["task"], registry=registry)
        self.redis_up = Gauge("mixtral_redis_up", "1 when Redis answered this scrape", registry=of_this_scrape)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request, in so many seconds. The two series that it counts in are looked up once: there is one for each answer of a route."""
        series = self._series.get((method, route, status))
        if series is None:
            series = self.requests.labels(method, route, str(status)), self.request_seconds.labels(route)
            self._series[method, route, status] = series
        series[0].inc()
        series[1].observe(seconds)

    def numbers(self) -> bytes:
        """What this process counted, for another one of its machine to show."""
        families = [
            (one.name, one.documentation, one.type, [(sample.name, sample.labels, sample.value) for sample in one.samples])
            for one in self._registry.collect()
        ]
        return orjson.dumps(families)

    def render(
        self,
        queues: Mapping[str, QueueNumbers],
        workers: Sequence[WorkerNumbers] = (),
        processes: Mapping[int, bytes | None] | None = None,
    ) -> bytes:
        """The text of one scrape. queues: what Redis said just now, by endpoint; workers: those with a lease, by login.

        processes: the numbers of every process behind this port, None for one that does not answer. Each sample names its process then:
        a sum would fall whenever one is started again, which reads as a counter that began anew.
        """
        self._queue.numbers = dict(queues)
        self._workers.workers = workers
        own = self._registry if processes is None else _ByProcess(processes)
        return generate_latest(self._of_this_scrape) + generate_latest(cast(CollectorRegistry, own))


class _ByProcess:
    """Numbers of several processes as one registry, each sample with a label that names its process."""

    def __init__(self, processes: Mapping[int, bytes | None]) -> None:
        self._processes = processes

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("mixtral_process_up", "1 for a server process that told its numbers to this scrape", labels=["process"])
        families: dict[str, Metric] = {}
        for index, numbers in sorted(self._processes.items()):
            up.add_metric([str(index)], numbers is not None)
            for name, sentence, kind, samples in orjson.loads(numbers or b"[]"):
                family = families.setdefault(name, Metric(name, sentence, kind))
                for sample, labels, value in samples:
                    family.add_sample(sample, {**labels, "process": str(index)}, value)
        return [up, *families.values()]
