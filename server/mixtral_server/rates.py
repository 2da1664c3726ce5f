"""What someone may start a minute: a rate, what is left of it, and how that is said. Pure.

Leaves the buckets themselves to lua/rates.lua, where they are taken from in the same step that queues a job, and whose rate is asked to
auth.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor


@dataclass(frozen=True)
class Rate:
    """Two buckets at one endpoint, of requests and of tokens: each holds a minute's worth at most and fills evenly. 0: no limit."""

    holder: str  # key, visitor or address
    name: str  # which one
    requests_per_minute: int = 0
    tokens_per_minute: int = 0

    @property
    def bucket(self) -> str:
        return f"{self.holder}:{self.name}"


@dataclass(frozen=True)
class Allowance:
    """What a rate's buckets held after a request was let in or refused; None where there is no limit. Below 0 is a debt."""

    rate: Rate
    requests: float | None
    tokens: float | None

    def headers(self) -> dict[str, str]:
        """As OpenAI names and writes them; reset is the time until the bucket is full."""
        shown: dict[str, str] = {}
        for kind, size, left in (
            ("Requests", self.rate.requests_per_minute, self.requests),
            ("Tokens", self.rate.tokens_per_minute, self.tokens),
        ):
            if left is not None:
                shown[f"X-RateLimit-Limit-{kind}"] = str(size)
                shown[f"X-RateLimit-Remaining-{kind}"] = str(max(0, floor(left)))
                shown[f"X-RateLimit-Reset-{kind}"] = duration((size - left) / size * 60)
        return shown

    def wait_s(self, tokens: int, jobs: int = 1) -> float:
        """Until so many jobs of so many tokens in all are let in. More than the whole bucket waits until that is full."""
        waits = [0.0]
        for size, left, needed in (
            (self.rate.requests_per_minute, self.requests, jobs),
            (self.rate.tokens_per_minute, self.tokens, tokens),
        ):
            if left is not None:
                waits.append((min(needed, size) - left) / size * 60)
        return max(waits)

    def refusal(self, endpoint: str, prompt_tokens: int, max_tokens: int, jobs: int = 1) -> str:
        """Which rule refused a request of that estimate, and what to do."""
        rate, tokens = self.rate, prompt_tokens + max_tokens
        more = ", or have it raised with `mixtral-server keys set`" if rate.holder == "key" else ""
        wait = f"{max(1, ceil(self.wait_s(tokens, jobs)))} s"
        if self.requests is not None and self.requests < min(jobs, rate.requests_per_minute):
            asks = f", {floor(max(0, self.requests)):,} are left; this request asks for {jobs} answers: ask for fewer," if jobs > 1 else ";"
            return f"this {rate.holder} may start {rate.requests_per_minute:,} chats a minute at {endpoint}{asks} wait {wait}{more}"
        return (
            f"this {rate.holder} may use {rate.tokens_per_minute:,} tokens a minute at {endpoint}, {floor(self.tokens or 0):,} are left; "
            f"this request may take {tokens:,}, {prompt_tokens:,} of prompt and {max_tokens:,} of answer: "
            f"ask for a shorter answer, wait {wait}{more}"
        )


def duration(seconds: float) -> str:
    """12ms, 1.5s, 6m0s."""
    ms = ceil(max(0.0, seconds) * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    return f"{minutes}m{ms / 1000:g}s" if minutes else f"{ms / 1000:g}s"
