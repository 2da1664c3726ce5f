"""What the steps cost and carried, kept on rank 0: time by part, bytes against the device's bandwidth, how even the experts' load is.

Decides what is counted and over which time. Leaves what becomes of the numbers to telemetry.py. Per step it adds a few numbers; everything
else waits until somebody asks for the figures.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mixtral_worker import capacity
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.plan import StepPlan
from mixtral_worker.telemetry import RATE_WINDOW_S

# L layers, E experts.

SNAPSHOT_EVERY_S = 1.0


class Account:
    def __init__(
        self,
        config: ModelConfig | None = None,
        precision: str = "fp32",
        bytes_per_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a config no bytes are counted; bytes_per_s, of all ranks together, is 0 where nobody knows it."""
        self.broadcast_s = self.compute_s = self.bytes = 0.0
        self.steps = self.rows = self.tokens = 0
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._kv_bytes = config.kv_bytes_per_token(capacity.kept_bytes(precision)) if config else 0
        self._weights_bytes = _weights_bytes(config, precision) if config else lambda tokens: 0.0
        self._window = Window()

    def add(self, plan: StepPlan, broadcast_s: float, compute_s: float) -> None:
        """Its bytes: the weights that so many tokens meet in the mean (capacity.experts_read), and every row's keys and values."""
        tokens = context = 0
        for row in plan.rows:
            tokens += len(row.tokens)
            context += row.start + len(row.tokens)
        self.steps += 1
        self.rows += len(plan.rows)
        self.tokens += tokens
        self.bytes += self._weights_bytes(tokens) + self._kv_bytes * context
        self.broadcast_s += broadcast_s
        self.compute_s += compute_s

    def figures(self, sample_s: float, expert_tokens: npt.NDArray[np.int64] | None) -> dict[str, Any]:
        """Fields of Telemetry. sample_s and expert_tokens [L, E] are totals since the start, as the engine has them."""
        forward_s = self.compute_s - sample_s
        counts = np.zeros(0) if expert_tokens is None else expert_tokens.ravel()
        grown = self._window.grown(self._clock(), np.concatenate([[self.bytes, forward_s], counts]))
        read, took_s = float(grown[0]), float(grown[1])
        return {
            "broadcast_s_total": self.broadcast_s,
            "forward_s_total": forward_s,
            "sample_s_total": sample_s,
            "steps_total": self.steps,
            "step_rows_total": self.rows,
            "step_tokens_total": self.tokens,
            "step_bytes_total": self.bytes,
            "device_bytes_per_s": self._bytes_per_s,
            "bandwidth_share": round(read / took_s / self._bytes_per_s, 4) if took_s and self._bytes_per_s else 0.0,
            "expert_imbalance": 0.0 if expert_tokens is None else imbalance(grown[2:].reshape(expert_tokens.shape)),
        }


class Window:
    """By how much totals have grown over the last RATE_WINDOW_S or so. The caller brings the clock."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, npt.NDArray[Any]]] = deque()

    def grown(self, now_s: float, totals: npt.NDArray[Any]) -> npt.NDArray[Any]:
        seen = self._seen
        while len(seen) > 1 and seen[1][0] <= now_s - RATE_WINDOW_S:
            seen.popleft()
        before = seen[0][1] if seen else np.zeros_like(totals)
        if not seen or now_s - seen[-1][0] >= SNAPSHOT_EVERY_S:
            seen.append((now_s, totals))
        growth: npt.NDArray[Any] = totals - before
        return growth


def imbalance(tokens: npt.NDArray[Any]) -> float:
    """The busiest expert over the mean one, per layer, then averaged over layers (pooled counts would hide it). tokens [L, E]; 0: none."""
    used = tokens[tokens.sum(1) > 0]
    return round(float((used.max(1) / used.mean(1)).mean()), 4) if len(used) else 0.0


def _weights_bytes(config: ModelConfig, precision: str) -> Callable[[int], float]:
    @lru_cache(maxsize=4096)
    def of(tokens: int) -> float:
        return capacity.weights_read_bytes(config, precision, tokens)

    return of
