"""Where a broken stream goes on, and for how long to try. Pure but for the clock and the dice that are handed in.

LogPosition decides what of a job's events is new to the reader and what is a repeat; Patience decides the waits between tries; Retry and
Timeouts are a caller's wishes about both. Leaves the network to client.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from mixtral_client.errors import PASSING, BadAnswer, ConnectionLost, JobFailed, LimitReached, MixtralError, Unavailable
from mixtral_client.protocol import (
    DoneEvent,
    ErrorEvent,
    JobEvent,
    MovedEvent,
    QueuedEvent,
    RewindEvent,
    TokenEvent,
    parse_event_id,
)
from mixtral_client.sse import ServerSentEvent

EVENTS: dict[str, type[JobEvent]] = {
    "queued": QueuedEvent,
    "token": TokenEvent,
    "moved": MovedEvent,
    "rewind": RewindEvent,
    "done": DoneEvent,
    "error": ErrorEvent,
}


class LogPosition:
    """What a reader has of one job's log. id is the Last-Event-ID that resumes after it ("" for the start)."""

    def __init__(self, job_id: str, after: str | int = "") -> None:
        self.job_id = job_id
        self.id = str(after)
        self.offset = parse_event_id(self.id)[0] if self.id else 0
        self.attempt = 0

    def take(self, raw: ServerSentEvent) -> JobEvent | None:
        """The event if it is new; None for a repeat or a kind this client does not know. Raises JobFailed at an `error` event,
        ConnectionLost at a gap (a new connection mends it), BadAnswer at what the wire does not allow."""
        if raw.event not in EVENTS:
            return None
        try:
            event = EVENTS[raw.event].model_validate_json(raw.data)
        except ValidationError as error:
            raise BadAnswer(f"event '{raw.event}' of job {self.job_id} does not fit the wire: {raw.data[:200]}") from error
        if isinstance(event, ErrorEvent):
            raise JobFailed(self.job_id, event.error)
        return event if self._is_new(event, raw.id) else None

    def _is_new(self, event: JobEvent, event_id: str) -> bool:
        if isinstance(event, TokenEvent):
            if event.offset <= self.offset:
                return False
            if event.offset > self.offset + 1:
                raise ConnectionLost(f"the stream of job {self.job_id} skipped from token {self.offset} to {event.offset}")
            self._move(event.offset, event_id)
        elif isinstance(event, RewindEvent):
            if event.to >= self.offset:
                return False
            self._move(event.to, event_id)
        elif isinstance(event, MovedEvent):
            if event.attempt <= self.attempt:
                return False
            self.attempt = event.attempt
        return True

    def _move(self, offset: int, event_id: str) -> None:
        # SSE ids outlive their event, so an id is trusted only if it names this offset; a bare offset resumes too.
        self.offset = offset
        self.id = event_id if event_id.partition(".")[0] == str(offset) else str(offset)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how long the client tries again. A wait that the server asks for (Retry-After) counts, and is kept if it fits."""

    give_up_after_s: float = 15.0  # plain requests
    resume_for_s: float = 120.0  # a stream that broke
    first_wait_s: float = 0.5  # each further wait is twice as long, less up to half of it by chance
    max_wait_s: float = 10.0
    max_tries: int = 50  # in a row without progress, the first one included; 1 never tries again

    def __post_init__(self) -> None:
        if self.max_tries < 1:
            raise ValueError(f"max_tries counts the first try and must be 1 or more; got {self.max_tries}")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits in seconds; None is none. The first three are of one try, which is repeated as Retry says (ConnectionLost in the end); the
    last two are of a whole answer, its wait in the queue and all tries included (TimedOut)."""

    connect_s: float | None = 5.0
    answer_s: float | None = 15.0  # until an answer begins; between the pieces of one that is no stream
    silence_s: float | None = 45.0  # of a stream; the server sends a comment every 12 s
    first_token_s: float | None = None
    total_s: float | None = None


class Patience:
    """The waits of one request or stream, from its first failure until it gives up."""

    def __init__(
        self,
        retry: Retry,
        give_up_after_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self.first_wait_s = retry.first_wait_s
        self._retry = retry
        self._give_up_after_s = give_up_after_s
        self._clock = clock
        self._dice = dice
        self._failures = 0
        self._since = 0.0

    def reset(self) -> None:
        """It works again: the next failure is a first one."""
        self._failures = 0

    def wait_s(self, error: MixtralError) -> float:
        """Seconds until the next try. Raises the error itself if it will not pass, or tries or time are up. Jittered, so that the many
        readers of a server that went away do not all come back in one moment."""
        if not isinstance(error, PASSING) or self._failures + 1 >= self._retry.max_tries:
            raise error
        now = self._clock()
        if self._failures == 0:
            self._since = now
        doubled = min(self.first_wait_s * 2.0 ** min(self._failures, 30), self._retry.max_wait_s)
        asked = (error.retry_after_s or 0.0) if isinstance(error, (LimitReached, Unavailable)) else 0.0
        wait_s = max(doubled * (0.5 + self._dice() / 2), asked)
        if now - self._since + wait_s > self._give_up_after_s:
            raise error
        self._failures += 1
        return wait_s
