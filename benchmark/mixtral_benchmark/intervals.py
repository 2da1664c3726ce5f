"""How sure a figure is: 95 % confidence intervals by bootstrap.

Pure; a seed of its own makes them repeatable. Decides what is drawn again: whole chats for latencies, since gaps of one chat depend on
one another, and stretches of one second for throughput, since what happens in one second depends on the one before.
A run that is too short for an interval gets none.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from math import ceil
from typing import TypeAlias

from mixtral_benchmark.measure import Chat, e2e_s, percentile, steady_window, streaming_span, tokens_per_s, tpot_s, ttft_s

RESAMPLES = 1000
FEWEST_CHATS = 10
FEWEST_SECONDS = 10
BLOCK_S = 3

Interval: TypeAlias = tuple[float, float]

LATENCIES: dict[str, Callable[[Chat], float | None]] = {"ttft": ttft_s, "tpot": tpot_s, "e2el": e2e_s}
SHOWN = {"mean": None, "median": 50, "p95": 95, "p99": 99}


def confidence(chats: Sequence[Chat]) -> dict[str, Interval]:
    """Figure → (low, high) of its 95 % interval, in the figure's own unit."""
    completed = [chat for chat in chats if chat.completed]
    found: dict[str, Interval] = {}
    for name, measure in LATENCIES.items():
        values = [value * 1000 for chat in completed if (value := measure(chat)) is not None]
        found |= {f"{statistic}_{name}_ms": interval for statistic, interval in _of_values(values).items()}
    speeds = [value for chat in completed if (value := tokens_per_s(chat)) is not None]
    if (median := _of_values(speeds).get("median")) is not None:
        found["median_chat_tokens_per_s"] = median
    if (interval := _of_throughput(chats)) is not None:
        found["steady_output_throughput"] = interval
    return found


def _of_values(values: Iterable[float]) -> dict[str, Interval]:
    """Mean, median, p95 and p99 of values drawn again with replacement."""
    ordered = sorted(values)
    if len(ordered) < FEWEST_CHATS:
        return {}
    draw = random.Random(0)
    drawn: dict[str, list[float]] = {statistic: [] for statistic in SHOWN}
    for _ in range(RESAMPLES):
        sample = sorted(draw.choices(ordered, k=len(ordered)))
        for statistic, percent in SHOWN.items():
            drawn[statistic].append(sum(sample) / len(sample) if percent is None else percentile(sample, percent))
    return {statistic: _middle(results) for statistic, results in drawn.items()}


def _of_throughput(chats: Sequence[Chat]) -> Interval | None:
    """Tokens per second of the steady window, from its seconds drawn again in blocks that run over its end to its beginning."""
    seconds = tokens_by_second(chats)
    if len(seconds) < FEWEST_SECONDS:
        return None
    draw = random.Random(0)
    twice = [0, *accumulate([*seconds, *seconds])]
    blocks, results = ceil(len(seconds) / BLOCK_S), []
    for _ in range(RESAMPLES):
        starts = (draw.randrange(len(seconds)) for _ in range(blocks))
        results.append(sum(twice[at + BLOCK_S] - twice[at] for at in starts) / (blocks * BLOCK_S))
    return _middle(results)


def tokens_by_second(chats: Iterable[Chat]) -> list[int]:
    """Tokens that arrived in each whole second of the steady window."""
    begun = [chat for chat in chats if chat.arrivals]
    window = steady_window([span for chat in begun if (span := streaming_span(chat))])
    if window is None:
        return []
    start, end = window
    arrived = sorted((arrival.at_s, arrival.tokens) for chat in begun for arrival in chat.arrivals)
    times, sums = [at_s for at_s, _ in arrived], [0, *accumulate(tokens for _, tokens in arrived)]
    edges = [start + i for i in range(int(end - start) + 1)]
    # A second holds what came after its beginning: the window opens with an arrival, whose tokens took the time before it.
    places = [bisect_right(times, edge) for edge in edges]
    return [sums[after] - sums[before] for before, after in pairwise(places)]


def _middle(results: list[float]) -> Interval:
    """The middle 95 % of what the draws gave."""
    ordered = sorted(results)
    return percentile(ordered, 2.5), percentile(ordered, 97.5)
