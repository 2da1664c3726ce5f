"""What the worker says about itself: the numbers that go out with each turn, and its log lines.

Decides names and form: one log line per event, `key=value`. Leaves to the loop when a number changes, and to the server what becomes of it.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

LOG = logging.getLogger("mixtral_worker")
SUMMARY_EVERY_S = 10.0
TELL_EVERY_S = 0.1  # how old the numbers of a turn may be: making them takes as long as a small model's layer
RATE_WINDOW_S = 10.0
PARTS = ("schedule", "broadcast", "forward", "sample", "detokenise")  # of a step


@dataclass(frozen=True)
class Telemetry:
    """Sent with each turn. Counts are of now; rates are of the last ten seconds; totals are since the start."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    kv_blocks_used: int = 0
    kv_blocks_kept: int = 0  # those, used or free, that a prompt with the same beginning would find
    kv_blocks: int = 0
    tokens_per_s: float = 0.0
    steps_per_s: float = 0.0
    tokens_total: int = 0
    jobs_total: int = 0
    failed_total: int = 0
    prompt_tokens_total: int = 0  # that entered the batch; again with what was generated when a job was preempted or had moved here
    reused_tokens_total: int = 0  # of these, so many were found in the cache instead of computed
    preemptions_total: int = 0
    # Steps since the start: how long each part of them took, and what they carried.
    schedule_s_total: float = 0.0
    broadcast_s_total: float = 0.0
    forward_s_total: float = 0.0  # on a GPU until the pass is launched; what is waited for it is then in sample_s_total
    sample_s_total: float = 0.0
    detokenise_s_total: float = 0.0
    steps_total: int = 0
    step_rows_total: int = 0  # divided by steps_total: the batch's mean size
    step_tokens_total: int = 0  # fed: one for each chat that decodes, and the prompts' chunks
    step_bytes_total: float = 0.0  # weights and KV cache that a step must read, by the formula of docs/capacity.md
    # Over the last ten seconds:
    bandwidth_share: float = 0.0  # bytes per second of forward pass over device_bytes_per_s
    expert_imbalance: float = 0.0  # busiest expert over the mean one, averaged over layers; 0 before any token
    device_bytes_per_s: float = 0.0  # what the devices can read; 0: unknown

    def as_fields(self) -> dict[str, Any]:
        return asdict(self)


def summary(before: Telemetry, now: Telemetry) -> dict[str, Any]:
    """The fields of the line that a worker writes every ten seconds: what its steps were like since the line before."""
    steps = max(1, now.steps_total - before.steps_total)

    def per_step(name: str) -> float:
        return float(getattr(now, f"{name}_total") - getattr(before, f"{name}_total")) / steps

    return {
        "running": now.running,
        "waiting": now.waiting,
        "slots": now.slots,
        "tokens_per_s": now.tokens_per_s,
        "steps_per_s": now.steps_per_s,
        "batch": round(per_step("step_rows"), 1),
        "step_tokens": round(per_step("step_tokens"), 1),
        **{f"{part}_ms": round(per_step(f"{part}_s") * 1000, 3) for part in PARTS},
        "kv_used": f"{now.kv_blocks_used}/{now.kv_blocks}",
        "reused_tokens": now.reused_tokens_total - before.reused_tokens_total,
        "preempted": now.preemptions_total - before.preemptions_total,
        "imbalance": now.expert_imbalance,
        "step_mb": round(per_step("step_bytes") / 1e6, 1),
        "bandwidth_share": now.bandwidth_share,
    }


class Rate:
    """Events per second over the last RATE_WINDOW_S. The caller brings the clock."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, now_s: float, count: int) -> None:
        self._counts.append((now_s, count))
        self._sum += count
        self._forget(now_s)

    def per_s(self, now_s: float) -> float:
        self._forget(now_s)
        if not self._counts:
            return 0.0
        return self._sum / max(now_s - self._counts[0][0], 1.0)

    def _forget(self, now_s: float) -> None:
        while self._counts and self._counts[0][0] < now_s - RATE_WINDOW_S:
            self._sum -= self._counts.popleft()[1]


def line(event: str, *, job: str | None = None, **fields: object) -> str:
    """One log line: the job first, then the event, then key=value; a value with blanks stands in quotes."""
    first = {"job": job} if job is not None else {}
    return " ".join(f"{name}={_shown(value)}" for name, value in {**first, "event": event, **fields}.items())


def _shown(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"' if not text or set(text) & set(' "\n=') else text
