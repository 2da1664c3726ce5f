"""Cursor: how far one reader is, and what it must be told next. Pure: it is shown log and news, and answers with events.

Decides what is new to a reader, what it must take back, and the ids its events resume by. Leaves when to look at the log to
follower.py, and how an event looks to the routes.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mixtral_client.protocol import DoneEvent, ErrorEvent, MovedEvent, QueuedEvent, RewindEvent, event_id, ids_crc
from mixtral_server.records import Appended, Entry, Snapshot

TokenRow: TypeAlias = tuple[int, int, str]
"""Offset, crc and text of one token."""


@dataclass(slots=True)
class Tokens:
    """Neighbouring tokens; offset is that of the first. Each has an id, a text, and the crc of all ids up to its own, which with its
    offset makes the SSE id that resumes after it."""

    offset: int
    ids: Sequence[int]
    texts: Sequence[str]
    crcs: Sequence[int]
    logprobs: Sequence[str] | None = None  # as many, where the job asked for them

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self) -> Sequence[TokenRow]:
        if len(self.ids) == 1:  # as nearly always, and told hundreds of times a turn
            return ((self.offset, self.crcs[0], self.texts[0]),)
        return list(zip(range(self.offset, self.offset + len(self.ids)), self.crcs, self.texts, strict=True))


@dataclass(frozen=True, slots=True)
class Notice:
    """What is told of a job beside its tokens. id is the SSE id that resumes after it; None: keep the last one."""

    event: QueuedEvent | MovedEvent | RewindEvent | DoneEvent | ErrorEvent
    id: str | None = None


Followed: TypeAlias = Tokens | Notice


class Cursor:
    """It keeps the ids that were sent, so that after a Redis that lost a suffix it knows how much of them still holds."""

    __slots__ = ("_anew", "_crc", "_ids", "_moves", "_resume")

    def __init__(self, after: int = 0, crc: int | None = None, *, is_new: bool = False) -> None:
        """is_new: the job is not yet put."""
        self._resume = None if (after, crc) == (0, None) else (after, crc)  # until the first look at the log
        self._ids = array("I")
        self._crc = 0
        self._moves: int | None = None
        self._anew: int | None = 0 if is_new else None

    @property
    def offset(self) -> int:
        return len(self._ids)

    def start_over(self, snapshot: Snapshot) -> list[Followed]:
        """snapshot: the whole log, read after offset 0. The first look must be this one."""
        is_anew = self._anew is not None and snapshot.anew != self._anew
        self._anew = snapshot.anew
        events = self._rewind([]) if is_anew and self._ids else self._align(snapshot.ids)
        return events + (self.catch_up(snapshot) or [])

    def catch_up(self, snapshot: Snapshot) -> list[Followed] | None:
        """snapshot: the log after this cursor's offset. None when it does not continue what was sent: then start over."""
        if snapshot.n < self.offset or snapshot.anew != self._anew:
            return None
        events: list[Followed] = []
        if snapshot.entries:
            texts = [text for entry in snapshot.entries for text in entry.texts]
            logprobs = [one for entry in snapshot.entries for one in entry.logprobs or ()]
            whole = logprobs if len(logprobs) == len(texts) else None  # a worker that has none to give may have made a part
            tokens = self.add(Entry(snapshot.entries[0].offset, snapshot.ids, texts, whole))
            if tokens is None:
                return None
            if tokens:
                events.append(tokens)
        moves = snapshot.attempt - (snapshot.state in ("leased", "streaming"))
        if self._moves is not None and moves > self._moves and not snapshot.terminal:
            events.append(Notice(MovedEvent(attempt=moves + 1)))
        self._moves = moves
        return events

    def add(self, entry: Appended) -> Tokens | None:
        """What of the entry is new to the reader, perhaps nothing. None when tokens before it are missing, or those sent were others."""
        tokens = self.new_of(entry)
        if tokens is not None:
            self.take(tokens)
        return tokens

    def new_of(self, entry: Appended) -> Tokens | None:
        """What add() would return; nothing is changed."""
        ids, texts, logprobs = entry.ids, entry.texts, entry.logprobs
        known = len(self._ids) - entry.offset + 1
        if known:
            sent = self._ids[entry.offset - 1 : entry.offset - 1 + len(ids)]
            if known < 0 or sent != array("I", ids[:known]):
                return None
            ids, texts, logprobs = ids[known:], texts[known:], logprobs and logprobs[known:]
        first, crc, crcs = len(self._ids) + 1, self._crc, []
        for token in ids:
            crc = zlib.crc32(token.to_bytes(4, "little"), crc)
            crcs.append(crc)
        return Tokens(first, ids, texts, crcs, logprobs)

    def take(self, tokens: Tokens) -> None:
        """They are sent. They are what new_of() returned last."""
        if tokens.ids:
            self._crc = tokens.crcs[-1]
            self._ids.extend(tokens.ids)

    def _align(self, log: Sequence[int]) -> list[Followed]:
        """Keep as much of what was sent as the log holds, and say so if that is not all."""
        if self._resume is not None:
            (after, crc), self._resume = self._resume, None
            is_prefix = after <= len(log) and crc in (None, ids_crc(log[:after]))
            return self._keep(log[:after]) if is_prefix else self._rewind([])
        sent = self._ids
        same = next((i for i, (a, b) in enumerate(zip(sent, log, strict=False)) if a != b), min(len(sent), len(log)))
        return self._rewind(log[:same]) if same < len(sent) else []

    def _keep(self, ids: Sequence[int]) -> list[Followed]:
        self._ids = array("I", ids)
        self._crc = ids_crc(ids)
        return []

    def _rewind(self, ids: Sequence[int]) -> list[Followed]:
        self._keep(ids)
        return [Notice(RewindEvent(to=self.offset), event_id(self.offset, self._crc))]
