"""Offences of workers: what only a broken or a hostile one sends. Counted for each session, which is cut when it has too many.

Decides what is an offence and what an honest race: a late frame of a job that was cancelled or moved, and a repeat, are none. Leaves the
count and the cut to lua/offend.lua.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection

from mixtral_client.protocol import Frame, TurnRequest
from mixtral_server.errors import SessionLapsed
from mixtral_server.keys import shard_of
from mixtral_server.metrics import Metrics
from mixtral_server.records import MAX_FRAME_TEXT_BYTES, MAX_TOKEN_TEXT_BYTES, Turned
from mixtral_server.redis_nodes import AnyRedis
from mixtral_server.scripts import LIFE, Scripts

log = logging.getLogger(__name__)

FORGOTTEN_MS = 10 * 60 * 1000
USUAL_FRAME_BYTES = 400
_SESSION = re.compile(rb'"session"\s*:\s*"([A-Za-z0-9_.-]{1,200})"')


class Offences:
    def __init__(self, redis: AnyRedis, endpoints: Collection[str], most: int, metrics: Metrics) -> None:
        """most: with so many a session is cut."""
        self._scripts = Scripts(redis, {"offend": (*LIFE, "offend")})
        self._endpoints = endpoints
        self._most = most
        self._metrics = metrics

    async def unreadable(self, raw: bytes, key_id: str) -> None:
        """A turn's body is none; the session that it seems to name is this key's, or it is not counted with any. Raises SessionLapsed."""
        found = _SESSION.search(raw)
        await self._note(found[1].decode() if found else "", key_id, ["unreadable"], [])

    async def judge(self, wanted: TurnRequest, answer: Turned, raw_bytes: int, key_id: str) -> None:
        """What was wrong with a turn that was taken: each kind counts once. Raises SessionLapsed when the session was cut for it."""
        kinds = ["offset_beyond"] if answer.expect else []
        if raw_bytes > MAX_FRAME_TEXT_BYTES + USUAL_FRAME_BYTES * len(wanted.frames) and any(map(is_too_long, wanted.frames)):
            kinds.append("text_too_long")
        dropped = {(one.job, one.attempt) for one in answer.drops}
        late = [(one.job, one.attempt) for one in wanted.frames if (one.job, one.attempt) in dropped] if dropped else []
        if kinds or late:
            await self._note(wanted.session, key_id, kinds, late)

    async def _note(self, session: str, key_id: str, kinds: list[str], late: list[tuple[str, int]]) -> None:
        shard = shard_of(session)
        reply = None
        if shard is not None and shard.endpoint in self._endpoints:
            pairs = [part for pair in late for part in pair]
            reply = await self._scripts.run("offend", shard, session, key_id, len(kinds), self._most, FORGOTTEN_MS, *pairs)
        count, is_stranger, is_cut, released = reply or (len(kinds), 0, 0, 0)
        kinds = [*kinds, "job_never_had"] if is_stranger else kinds
        for kind in kinds:
            self._metrics.offences.labels(kind).inc()
        if kinds:
            log.warning("session=%s event=offence kinds=%s count=%d most=%d", session or "unknown", ",".join(kinds), count, self._most)
        if is_cut:
            log.warning("session=%s event=session_cut offences=%d released=%d", session, count, released)
            raise SessionLapsed(
                f"session {session!r} was cut after {count} offences, {self._most} at most, the last: {', '.join(kinds)}; "
                f"its {released} jobs are back in the queue; update the worker and log in anew"
            )


def is_too_long(frame: Frame) -> bool:
    """The queue fails its job for it; a text of many bytes a character may pass here, not there."""
    return sum(map(len, frame.texts)) > MAX_FRAME_TEXT_BYTES + MAX_TOKEN_TEXT_BYTES * len(frame.ids)
