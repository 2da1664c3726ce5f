"""A job, an endpoint and its workers as AIME's clients see them.

Decides the names and numbers of these bodies, and how a poll stays cheap: the text so far is kept here, so that each poll reads from Redis
only what is new. Leaves routes and who may ask to aime.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from mixtral_server.endpoints import EndpointConfig
from mixtral_server.queue import JobQueue
from mixtral_server.records import Depth, LiveWorker, Place, Snapshot
from mixtral_server.routes.aime_inputs import inputs_of

EP_VERSION = 2  # of AIME's own mixtral_chat
MAX_KEPT_CHARS = 8 * 2**20  # of all texts together
WORKERS_FRESH_S = 1.0  # so old may be what a poll says of workers

OUTPUTS = {
    "text": "string",
    "num_generated_tokens": "integer",
    "model_name": "string",
    "max_seq_len": "integer",
    "current_context_length": "integer",
    "error": "string",
}
PROGRESS_OUTPUTS = {"text": "string", "num_generated_tokens": "integer"}


class Texts:
    """The texts of jobs that are being polled, as far as they were read; the longest unasked go first."""

    def __init__(self, queue: JobQueue, max_chars: int = MAX_KEPT_CHARS) -> None:
        self._queue = queue
        self._max_chars = max_chars
        self._chars = 0
        self._kept: OrderedDict[str, tuple[int, str]] = OrderedDict()  # job → (tokens, their text)

    async def look(self, job_id: str) -> tuple[Snapshot, str]:
        """The record with entries not yet read, and the whole text. Raises JobNotFound, RedisUnavailable."""
        tokens, text = self._kept.get(job_id, (0, ""))
        job = await self._queue.read(job_id, tokens)
        if job.n < tokens:  # a Redis that came back without its last second: what was kept is no longer true
            tokens, text = 0, ""
            job = await self._queue.read(job_id)
        text += "".join(one for entry in job.entries for one in entry.texts[max(0, tokens - entry.first + 1) :])
        self._forget(job_id)
        if not job.terminal:
            self._keep(job_id, job.n, text)
        return job, text

    def _keep(self, job_id: str, tokens: int, text: str) -> None:
        self._kept[job_id] = (tokens, text)
        self._chars += len(text)
        while self._chars > self._max_chars:
            self._forget(next(iter(self._kept)))

    def _forget(self, job_id: str) -> None:
        _, text = self._kept.pop(job_id, (0, ""))
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


def progress_of(job: Snapshot, text: str, place: Place | None, workers_online: int) -> dict[str, Any]:
    """estimate is in seconds: -1 without a worker, 0 where nothing is known, which is so once the job runs."""
    return {
        "progress": job.n,
        "progress_data": {"text": text, "num_generated_tokens": job.n} if job.n else {},
        "queue_position": place.position if place else 0,
        "estimate": -1 if not workers_online else place.eta_s or 0.0 if place else 0.0,
        "num_workers_online": workers_online,
    }


def result_of(job: Snapshot, text: str, ticket: str, workers: Sequence[LiveWorker]) -> dict[str, Any]:
    """The result of a job that ended. A failed one is a result too, with its error; so is a cancelled one: Python's client waits for no
    other end."""
    assert job.usage is not None  # of every job that ended
    assert job.timings is not None
    result: dict[str, Any] = {
        "success": True,
        "job_id": ticket,
        "ep_version": EP_VERSION,
        "text": text,
        "num_generated_tokens": job.n,
        "model_name": job.endpoint,
        "current_context_length": job.usage.total_tokens,
        "start_time": job.created,
    }
    if workers:
        result["max_seq_len"] = max(one.max_seq_len for one in workers)
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
        "version": EP_VERSION,
        "category": "chat",
        "max_queue_length": endpoint.max_waiting,
        "max_time_in_queue": endpoint.queue_timeout_s,
        "free_queue_slots": max(0, endpoint.max_waiting - depth.waiting),
        "num_active_workers": sum(one.running > 0 for one in workers),
        "num_workers": len(workers),
        "workers": [_worker(one) for one in workers],
        "parameter_description": {
            "input": {name: one.described() for name, one in inputs_of(endpoint).items()},
            "output": {name: {"type": kind} for name, kind in OUTPUTS.items()},
            "progress": {"OUTPUTS": {name: {"type": kind} for name, kind in PROGRESS_OUTPUTS.items()}},
        },
    }


def _worker(one: LiveWorker) -> dict[str, Any]:
    """A worker says its device in one text: number and framework of its GPUs are part of that, or unknown."""
    return {
        "name": one.name,
        "state": "processing" if one.running else "waiting",
        "max_batch_size": one.max_slots,
        "free_slots": max(0, one.max_slots - one.running),
        "gpu_name": one.device,
        "num_gpus": None,
        "framework": None,
        "framework_version": None,
        "pytorch_version": None,
        "model": {"label": one.model, "quantization": None, "size": None, "family": None, "type": None, "repo_name": None},
    }
