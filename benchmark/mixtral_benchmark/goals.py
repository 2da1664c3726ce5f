"""Service-level objectives: what a user must not wait longer for, and how many chats kept to it.

Pure. Decides which latencies can be goals and when a chat is good: it completed, and kept every goal. A chat that failed, or was
refused, is not good, whatever it measured. Latencies count from the planned send, so that a late sender makes nobody look good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mixtral_benchmark.measure import Chat, Figure, frame_gaps_s, per_second, scheduled_e2e_s, scheduled_ttft_s, tpot_s


def _worst_gap_s(chat: Chat) -> float | None:
    return max(frame_gaps_s(chat.arrivals), default=None)


MEASURES: Mapping[str, Callable[[Chat], float | None]] = {
    "ttft_ms": scheduled_ttft_s,
    "tpot_ms": tpot_s,
    "e2el_ms": scheduled_e2e_s,
    "gap_ms": _worst_gap_s,  # the longest pause within the answer
}


def parse_goals(texts: Sequence[str]) -> dict[str, float]:
    """`ttft_ms:500 tpot_ms:50` → {"ttft_ms": 500.0, "tpot_ms": 50.0}. Raises ValueError with the rule."""
    goals: dict[str, float] = {}
    for text in texts:
        name, _, limit = text.partition(":")
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = 0.0
        if name not in MEASURES or not 0 < limit_ms < float("inf"):
            raise ValueError(f"must be NAME:MILLISECONDS with NAME one of {', '.join(MEASURES)}; got {text!r}")
        goals[name] = limit_ms
    return goals


def is_good(chat: Chat, goals: Mapping[str, float]) -> bool:
    """A latency that the chat does not have (one token has no gap) cannot be missed."""
    if not chat.completed:
        return False
    measured = ((MEASURES[name](chat), limit_ms) for name, limit_ms in goals.items())
    return all(seconds is None or seconds * 1000 <= limit_ms for seconds, limit_ms in measured)


def goodput(chats: Sequence[Chat], duration_s: float, goals: Mapping[str, float]) -> dict[str, Figure]:
    """Good chats a second, and their share of all that came to an end. None without goals."""
    if not goals:
        return {"request_goodput": None, "good_share": None}
    over = [chat for chat in chats if chat.completed or chat.failure]
    good = sum(is_good(chat, goals) for chat in over)
    return {"request_goodput": per_second(good, duration_s), "good_share": good / len(over) if over else None}
