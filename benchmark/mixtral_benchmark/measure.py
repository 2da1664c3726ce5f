"""Timestamps in, statistics out: every figure of the benchmark is defined here, once.

Decides what TTFT, TPOT, a gap, a frame, the steady window and a percentile are. Reads no clock, does no I/O and knows no wire:
load.py fills in the chats, report.py shows what comes out. docs/benchmarking.md says the same in prose.

All times are seconds of one monotonic clock of this machine. Tokens that one read of the socket brought have one time, that of
the read: we cannot know more, and say how often it happened.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

STEADY_SHARE = 0.9
"""The steady window lasts while at least this share of the peak number of chats is streaming."""

PERCENTILES = (90, 95, 99)

Figure: TypeAlias = float | int | None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One event that brought tokens."""

    at_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a chat did not complete: one code word to count by, one sentence to read."""

    code: str
    message: str


@dataclass(slots=True)
class Chat:
    """One request as the client saw it. ended_s is None while it runs; a chat neither failed nor ended was interrupted."""

    index: int
    scheduled_s: float
    sent_s: float
    arrivals: list[Arrival] = field(default_factory=list)
    ended_s: float | None = None
    failure: Failure | None = None
    finish: str | None = None
    job: str | None = None
    last_offset: int | None = None
    usage_tokens: int | None = None
    prompt_tokens: int | None = None
    server_queue_s: float | None = None
    server_first_token_s: float | None = None
    moves: int = 0
    rewinds: int = 0
    turn: int = 0
    """Of its talk, from 0."""
    texts: list[str] | None = None
    """What was answered, where a next turn needs it."""

    @property
    def completed(self) -> bool:
        return self.ended_s is not None and self.failure is None

    @property
    def tokens(self) -> int:
        """Exact where the server says offsets, else as its usage says, else the events that brought text."""
        if self.last_offset is not None:
            return self.last_offset
        return self.usage_tokens if self.usage_tokens is not None else sum(arrival.tokens for arrival in self.arrivals)

    @property
    def token_source(self) -> str:
        return "offsets" if self.last_offset is not None else "usage" if self.usage_tokens is not None else "events"


def ttft_s(chat: Chat) -> float | None:
    """Time to first token, from the actual send."""
    return chat.arrivals[0].at_s - chat.sent_s if chat.arrivals else None


def scheduled_ttft_s(chat: Chat) -> float | None:
    """Time to first token, from the moment at which the plan wanted the chat sent."""
    return chat.arrivals[0].at_s - chat.scheduled_s if chat.arrivals else None


def e2e_s(chat: Chat) -> float | None:
    """Send to end of stream."""
    return None if chat.ended_s is None else chat.ended_s - chat.sent_s


def scheduled_e2e_s(chat: Chat) -> float | None:
    return None if chat.ended_s is None else chat.ended_s - chat.scheduled_s


def tpot_s(chat: Chat) -> float | None:
    """Time per output token after the first: (last arrival − first arrival) / (tokens − 1). None below two tokens."""
    if chat.tokens < 2 or not chat.arrivals:
        return None
    return (chat.arrivals[-1].at_s - chat.arrivals[0].at_s) / (chat.tokens - 1)


def tokens_per_s(chat: Chat) -> float | None:
    """How fast this chat's reader was served once it had begun: 1 / TPOT. None where all tokens came at once."""
    tpot = tpot_s(chat)
    return 1 / tpot if tpot else None


def token_gaps_s(arrivals: Sequence[Arrival]) -> list[float]:
    """Inter-token latencies: one fewer than the tokens placed; 0 between tokens of one event or of one read."""
    gaps: list[float] = []
    for i, arrival in enumerate(arrivals):
        if i:
            gaps.append(arrival.at_s - arrivals[i - 1].at_s)
        gaps.extend([0.0] * (arrival.tokens - 1))
    return gaps


def frames(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Arrivals of one moment joined: what one read of the socket brought."""
    joined: list[Arrival] = []
    for arrival in arrivals:
        if joined and joined[-1].at_s == arrival.at_s:
            arrival = Arrival(arrival.at_s, joined.pop().tokens + arrival.tokens)
        joined.append(arrival)
    return joined


def frame_gaps_s(arrivals: Sequence[Arrival]) -> list[float]:
    """The pauses that a reader sees: between frames, never 0."""
    at_s = [frame.at_s for frame in frames(arrivals)]
    return [after - before for before, after in pairwise(at_s)]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which percent of the ordered values lie, interpolated linearly between neighbours. Raises ValueError if empty."""
    if not ordered:
        raise ValueError("a percentile needs at least one value; got none")
    rank = percent / 100 * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    # Not a + (b − a)·w: with equal neighbours that may miss them by a rounding error, and p50 could pass p99.
    weight = rank - below
    return ordered[below] if ordered[below] == ordered[above] else ordered[below] * (1 - weight) + ordered[above] * weight


@dataclass(frozen=True)
class Distribution:
    """Mean, population standard deviation and percentiles of at least one value."""

    count: int
    mean: float
    std: float
    percentiles: dict[int, float]
    lowest: float
    highest: float


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """None values are left out; no value at all gives None."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    mean = math.fsum(ordered) / len(ordered)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))
    return Distribution(
        count=len(ordered),
        mean=min(max(mean, ordered[0]), ordered[-1]),
        std=std,
        percentiles={percent: percentile(ordered, percent) for percent in (1, 5, 50, *PERCENTILES)},
        lowest=ordered[0],
        highest=ordered[-1],
    )


Span: TypeAlias = tuple[float, float]


def levels(spans: Iterable[Span]) -> list[tuple[float, int]]:
    """How many spans are open from each moment on, in order of time. A span that ends when another begins does not overlap it."""
    steps: Counter[float] = Counter()
    for start, end in spans:
        steps[start] += 1
        steps[end] -= 1
    level = 0
    return [(at, level := level + step) for at, step in sorted(steps.items())]


def peak_overlap(spans: Iterable[Span]) -> int:
    """Most spans open at one moment."""
    return max((level for _, level in levels(spans)), default=0)


def steady_window(spans: Sequence[Span]) -> Span | None:
    """From the first to the last moment at which STEADY_SHARE of the peak number of spans was open: without ramp-up and ramp-down."""
    steps = levels(spans)
    peak = max((level for _, level in steps), default=0)
    if peak == 0:
        return None
    full = [i for i, (_, level) in enumerate(steps) if level >= STEADY_SHARE * peak]
    return steps[full[0]][0], steps[full[-1] + 1][0]


def streaming_span(chat: Chat) -> Span | None:
    """First token to last sign of life."""
    if not chat.arrivals:
        return None
    return chat.arrivals[0].at_s, chat.arrivals[-1].at_s if chat.ended_s is None else chat.ended_s


def steady_throughput(chats: Iterable[Chat]) -> tuple[float, float] | None:
    """(length in seconds, tokens per second) of the steady window. Counts every token that arrived in it, whatever became of its chat."""
    begun = [chat for chat in chats if chat.arrivals]
    window = steady_window([span for chat in begun if (span := streaming_span(chat))])
    if window is None:
        return None
    start, end = window
    # The window opens with an arrival: those tokens took the time before it.
    tokens = sum(arrival.tokens for chat in begun for arrival in chat.arrivals if start < arrival.at_s <= end)
    return end - start, tokens / (end - start)


def latencies_s(completed: Sequence[Chat]) -> dict[str, Distribution | None]:
    """Every latency of the result under its name there, in the order of the table."""
    return {
        "ttft": distribution(map(ttft_s, completed)),
        "scheduled_ttft": distribution(map(scheduled_ttft_s, completed)),
        "tpot": distribution(map(tpot_s, completed)),
        "itl": distribution(gap for chat in completed for gap in token_gaps_s(chat.arrivals)),
        "frame_gap": distribution(gap for chat in completed for gap in frame_gaps_s(chat.arrivals)),
        "e2el": distribution(map(e2e_s, completed)),
        "scheduled_e2el": distribution(map(scheduled_e2e_s, completed)),
        "server_queue": distribution(chat.server_queue_s for chat in completed),
        "server_prefill": distribution(map(server_prefill_s, completed)),
        "network_ttft": distribution(map(network_ttft_s, completed)),
    }


def server_prefill_s(chat: Chat) -> float | None:
    """First lease to first token in the log, by the server's clock."""
    if chat.server_queue_s is None or chat.server_first_token_s is None:
        return None
    return chat.server_first_token_s - chat.server_queue_s


def network_ttft_s(chat: Chat) -> float | None:
    """What of the TTFT the server did not see: connecting, sending, the way back. The difference of two durations, never of two clocks."""
    ttft = ttft_s(chat)
    return None if ttft is None or chat.server_first_token_s is None else ttft - chat.server_first_token_s


def figures(chats: Sequence[Chat], started_s: float, ended_s: float) -> dict[str, Figure]:
    """Every figure of a run, flat. Totals and latencies are of completed chats; failed and interrupted ones are only counted.

    Names are those of `vllm bench serve` where the meaning is the same. None where nothing was there to measure.
    """
    completed = [chat for chat in chats if chat.completed]
    duration_s = ended_s - started_s
    input_tokens = sum(chat.prompt_tokens or 0 for chat in completed)
    output_tokens = sum(chat.tokens for chat in completed)
    found: dict[str, Figure] = {
        "completed": len(completed),
        "failed": sum(chat.failure is not None for chat in chats),
        "interrupted": sum(chat.failure is None and chat.ended_s is None for chat in chats),
        "duration": duration_s,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": per_second(len(completed), duration_s),
        "output_throughput": per_second(output_tokens, duration_s),
        "total_token_throughput": per_second(input_tokens + output_tokens, duration_s),
        "max_concurrent_requests": peak_overlap((chat.sent_s, ended_s if chat.ended_s is None else chat.ended_s) for chat in chats),
    }
    steady = steady_throughput(chats)
    found |= {"steady_window_s": steady and steady[0], "steady_output_throughput": steady and steady[1]}
    found |= chat_speed(completed) | frame_shares(completed)
    found |= {f"tokens_counted_by_{name}": sum(c.token_source == name for c in completed) for name in ("offsets", "usage", "events")}
    found |= {"moved_chats": sum(c.moves > 0 for c in completed), "rewound_chats": sum(c.rewinds > 0 for c in completed)}
    for name, spread in latencies_s(completed).items():
        found |= latency_figures(name, spread)
    return found


def per_second(count: float, duration_s: float) -> float | None:
    return count / duration_s if duration_s > 0 else None


def chat_speed(completed: Sequence[Chat]) -> dict[str, Figure]:
    """Tokens per second of one chat, once begun. The low percentiles are the slow chats."""
    speed = distribution(map(tokens_per_s, completed))
    found = (None, None, None, None) if speed is None else (speed.mean, *(speed.percentiles[percent] for percent in (50, 5, 1)))
    return dict(zip((f"{name}_chat_tokens_per_s" for name in ("mean", "median", "p5", "p1")), found, strict=True))


def frame_shares(completed: Sequence[Chat]) -> dict[str, Figure]:
    """How often several tokens came together, so that their times are one."""
    sizes = [frame.tokens for chat in completed for frame in frames(chat.arrivals)]
    shared = [size for size in sizes if size > 1]
    return {
        "frames": len(sizes),
        "frames_with_several_tokens": len(shared),
        "tokens_in_shared_frames": sum(shared),
        "max_tokens_in_a_frame": max(sizes, default=0),
    }


def latency_figures(name: str, spread: Distribution | None) -> dict[str, Figure]:
    names = ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES))
    if spread is None:
        return {f"{statistic}_{name}_ms": None for statistic in names}
    values = (spread.mean, spread.percentiles[50], spread.std, *(spread.percentiles[percent] for percent in PERCENTILES))
    return {f"{statistic}_{name}_ms": value * 1000 for statistic, value in zip(names, values, strict=True)}


def failures(chats: Iterable[Chat]) -> dict[str, int]:
    """Code word → how many chats failed with it, the most frequent first."""
    counts = Counter(chat.failure.code for chat in chats if chat.failure)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
