"""A job, an endpoint and its workers as AIME's clients see them.

Decides the names and numbers of these bodies, and how a poll stays cheap: the text so far is kept here, so that each poll reads from Redis
only what is new. Leaves routes and who may ask to aime.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mixtral_server.endpoints import EndpointConfig
from mixtral_server.queue import JobQueue
from mixtral_server.records import Depth, LiveWorker, Place, Snapshot
from mixtral_server.routes.aime_inputs import inputs_of
from mixtral_server.routes.aime_jobs import outputs_of, progress_outputs_of

MAX_KEPT_CHARS = 8 * 2**20  # of all texts together
WORKERS_FRESH_S = 1.0  # so old may be what a poll says of workers
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Texts:
    """The texts of jobs that are being polled, as far as they were read; the longest unasked go first."""

    def __init__(self, queue: JobQueue, max_chars: int = MAX_KEPT_CHARS) -> None:
        self._queue = queue
        self._max_chars = max_chars
        self._chars = 0
        self._kept: OrderedDict[str, tuple[int, int, str]] = OrderedDict()  # job → (times its log began anew, tokens, their text)

    async def look(self, job_id: str) -> tuple[Snapshot, str]:
        """The record with entries not yet read, and the whole text. Raises JobNotFound, RedisUnavailable."""
        anew, tokens, text = self._kept.get(job_id, (0, 0, ""))
        job = await self._queue.read(job_id, tokens)
        if job.anew != anew or job.n < tokens:  # the latter: a Redis that came back without its last second
            tokens, text = 0, ""
            job = await self._queue.read(job_id)
        text += "".join(one for entry in job.entries for one in entry.texts[max(0, tokens - entry.offset + 1) :])
        self._forget(job_id)
        if not job.terminal:
            self._keep(job_id, (job.anew, job.n, text))
        return job, text

    def _keep(self, job_id: str, known: tuple[int, int, str]) -> None:
        self._kept[job_id] = known
        self._chars += len(known[2])
        while self._chars > self._max_chars:
            self._forget(next(iter(self._kept)))

    def _forget(self, job_id: str) -> None:
        _, _, text = self._kept.pop(job_id, (0, 0, ""))
        self._chars -= len(text)


class Workers:
    """Who is logged in to an endpoint, asked of Redis once a second at most however many poll."""

    def __init__(self, queue: JobQueue, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds"""
        self._queue = queue
        self._clock = clock
        self._known: dict[str, tuple[float, Sequence[LiveWorker]]] = {}

    async def of(self, endpoint: str) -> Sequence[LiveWorker]:
        """Raises RedisUnavailable."""
        asked_at, workers = self._known.get(endpoint, (float("-inf"), ()))
        now = self._clock()
        if now - asked_at >= WORKERS_FRESH_S:
            workers = await self._queue.sessions(endpoint)
            self._known[endpoint] = (now, workers)
        return workers


def progress_of(
    job: Snapshot, endpoint: EndpointConfig, text: str, place: Place | None, workers_online: int, said: Mapping[str, Any] = NOTHING
) -> dict[str, Any]:
    """said: what an AIME worker says of it. estimate is in seconds: -1 without a worker, 0 where nothing is known, which is so once the job
    runs."""
    declared = progress_outputs_of(endpoint)
    ours = {"text": text, "num_generated_tokens": job.n} if job.n else {}
    return {
        "progress": said.get("progress", job.n),
        "progress_data": {**{name: value for name, value in ours.items() if name in declared}, **said.get("progress_data", {})},
        "queue_position": place.position if place else 0,
        "estimate": -1 if not workers_online else place.eta_s or 0.0 if place else 0.0,
        "num_workers_online": workers_online,
    }


def result_of(
    job: Snapshot, endpoint: EndpointConfig, text: str, ticket: str, workers: Sequence[LiveWorker], said: Mapping[str, Any] = NOTHING
) -> dict[str, Any]:
    """The result of a job that ended; said: what an AIME worker sent as such.

    A failed job is a result too, with its error; so is a cancelled one: Python's client waits for no other end.
    """
    assert job.usage is not None  # of every job that ended
    assert job.timings is not None
    ours: dict[str, Any] = {
        "text": text,
        "num_generated_tokens": job.n,
        "model_name": job.endpoint,
        "current_context_length": job.usage.total_tokens,
    }
    if longest := max((one.max_seq_len for one in workers), default=0):
        ours["max_seq_len"] = longest
    declared = outputs_of(endpoint)
    result: dict[str, Any] = {"success": True, "job_id": ticket, "ep_version": endpoint.version}
    result |= {name: value for name, value in ours.items() if name in declared}
    result |= said.get("outputs", {}) | said.get("times", {})
    result["start_time"] = job.created
    if endpoint.clients.provide_worker_meta_data:
        result |= said.get("worker", {})
    total_s, queue_s = job.timings.total_s or 0.0, job.timings.queue_s
    result |= {"result_received_time": job.created + total_s, "total_duration": round(total_s, 3)}
    if queue_s is not None:
        # never 0: AIME's page divides by it
        result |= {"start_time_compute": job.created + queue_s, "compute_duration": max(0.001, round(total_s - queue_s, 3))}
    if job.error is not None:
        result["error"] = job.error.message
    elif job.state == "cancelled":
        result["error"] = "the job was cancelled before its answer was whole"
    return result


def details_of(endpoint: EndpointConfig, depth: Depth, workers: Sequence[LiveWorker]) -> dict[str, Any]:
    return {
        "name": endpoint.name,
        "title": endpoint.title,
        "description": endpoint.description,
        "http_methods": ["GET", "POST"],
        "version": endpoint.version,
        "category": endpoint.category,
        "max_queue_length": endpoint.max_waiting,
        "max_time_in_queue": endpoint.queue_timeout_s,
        "free_queue_slots": max(0, endpoint.max_waiting - depth.waiting),
        "num_active_workers": sum(one.running > 0 for one in workers),
        "num_workers": len(workers),
        "workers": [_worker(one) for one in workers],
        "parameter_description": {
            "input": {name: one.described() for name, one in inputs_of(endpoint).items()},
            "output": {name: one.model_dump() for name, one in outputs_of(endpoint).items()},
            "progress": {"OUTPUTS": {name: one.model_dump() for name, one in progress_outputs_of(endpoint).items()}},
        },
    }


def _worker(one: LiveWorker) -> dict[str, Any]:
    """A native worker says its device in one text: number and framework of its GPUs are part of that, or unknown."""
    about = one.about
    return {
        "name": one.name,
        "state": "processing" if one.running else "waiting",
        "max_batch_size": one.max_slots,
        "free_slots": max(0, one.max_slots - one.running),
        "gpu_name": about.get("gpu_name") or one.device,
        **{name: about.get(name) for name in ("num_gpus", "framework", "framework_version", "pytorch_version")},
        "model": {
            "label": one.model,
            **{name: about.get(f"model_{name}") for name in ("quantization", "size", "family", "type", "repo_name")},
        },
    }
