"""Every Redis key of the queue: its name, type, who writes it and what bounds it. Ids that name the keys they belong to.

All keys of an endpoint begin with one hash tag, `{endpoint.shard}`, so that each script runs on one cluster slot. Job and session
ids begin with the same words, so any replica finds the keys from an id alone. The scripts write the names a second time
(lua/); a test holds the two equal. Pure: no I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mixtral_server.entropy import token_hex

SHARD = 0
"""Every endpoint has one shard; ids carry its number so that more can come."""

_ID = re.compile(r"([A-Za-z0-9_]{1,100})\.(\d{1,4})-[0-9a-f]{32}")


@dataclass(frozen=True)
class Key:
    """A kind of key. pattern stands after the hash tag; <x> is any text."""

    pattern: str
    type: Literal["string", "hash", "set", "zset", "stream"]
    writer: str
    content: str
    bound: str


KEYS = (
    Key(":format", "string", "start", "number of this layout", "one"),
    Key(":tick", "string", "reap", "when reap last ran, ms", "one"),
    Key(":clock", "hash", "put, reap", "queue time: µs nobody watched, the last arrival; µs of ageing", "one"),
    Key(":job:<id>", "hash", "put, turn, cancel, reap", "state, request, lease, counts, end", "queue limits; expires after its end"),
    Key(
        ":log:<id>",
        "stream",
        "turn, cancel, reap",
        "`<last offset>-0`: ids, texts; `<n>-1`: end, odd as are later ends",
        "max_tokens; expires with its job",
    ),
    Key(":idem:<user>:<key>", "hash", "put", "job id and body hash of an idempotency key", "one per job; expires with it"),
    Key(":wait:<user>", "zset", "put, turn, cancel, reap", "a user's waiting jobs by when they are due", "max_waiting_per_user"),
    Key(":suspects", "zset", "reap", "waiting jobs with two deaths, by when they are due", "max_waiting"),
    Key(":native:<user>", "zset", "put, turn, cancel, reap", "of a user's line, the jobs that native workers alone can serve", ":wait"),
    Key(":closed", "hash", "put, turn, cancel, reap", "jobs: how many those are in all lines", "one"),
    Key(":native_suspects", "zset", "turn, cancel, reap", "of the suspects, the same", ":suspects"),
    Key(":lower", "zset", "put, turn, cancel, reap", "waiting jobs of priorities after 0, by when they are due", "max_waiting"),
    Key(":waiting", "hash", "put, turn, cancel, reap", "priority → waiting jobs", "priorities"),
    Key(":waiting_of", "hash", "put, turn, cancel, reap", "user → waiting jobs", "max_waiting"),
    Key(":tokens_of", "hash", "put, turn, cancel, reap", "user → estimated tokens of waiting jobs; empty name → of all", "max_waiting"),
    Key(":stands", "hash", "put, turn, cancel, reap", "user → level, and where its virtual time began there", "max_waiting"),
    Key(":lifts", "zset", "put, turn, cancel, reap", "users after level 0 by when they rise, µs of queue time", "max_waiting"),
    Key(":ring:<level>", "zset", "put, turn, cancel, reap", "users who stand at that level by virtual time", "max_waiting"),
    Key(
        ":spent:<level>",
        "zset",
        "put, turn, cancel, reap",
        "users who left that level and owe time",
        "10,000; gone when nobody stands there",
    ),
    Key(":load:<level>", "hash", "turn, cancel, reap", "user → units charged for running jobs", "running jobs"),
    Key(":vclock", "hash", "turn", "level → virtual time of the user served last", "levels"),
    Key(":cap:<key>", "hash", "put, turn, cancel, reap", "of a key with max_running: that number, and jobs admitted", "keys with jobs"),
    Key(":lined:<key>", "zset", "put, turn, cancel, reap", "its admitted jobs that wait, by when they are due", "max_running"),
    Key(":parked:<key>", "zset", "put, turn, cancel, reap", "its waiting jobs above max_running, by when they are due", "max_waiting"),
    Key(":parked", "string", "put, turn, cancel, reap", "jobs parked in all", "one"),
    Key(":idle", "string", "turn, put, cancel, reap", "a worker waits for work: the next job wakes it", "one"),
    Key(":filling", "string", "turn", "since when a whole batch waits to be filled, ms", "one"),
    Key(":eta", "hash", "turn", "how far off the ETAs were: starts by seconds off", "one"),
    Key(":bucket:<rate>", "hash", "put, turn, cancel, reap", "what a rate has left, and when", "keys and visitors; gone when full"),
    Key(":deadlines", "zset", "put, turn, cancel, reap", "queue-time limits of waiting jobs, ms", "max_waiting"),
    Key(":sessions", "zset", "open, turn, reap", "session → lease end, ms", "max_sessions_per_key"),
    Key(":session:<id>", "hash", "open, turn", "what a worker said of itself, its last turn", "as :sessions"),
    Key(":held:<session>", "hash", "turn, cancel, reap", "job → attempt: the fence", "max_slots"),
    Key(":key:<key>", "set", "open, close, reap", "sessions of a worker key", "max_sessions_per_key"),
    Key(":rate", "hash", "turn, cancel, reap", "finish rate of about the last minute", "one"),
    Key(":totals", "hash", "turn, cancel, reap", "jobs by end, tokens, since the first day", "states"),
    Key(":usage", "stream", "turn, cancel, reap", "outbox: one row per ended job", "max_unsaved_usage, then put refuses"),
    Key(":dead", "stream", "reap", "jobs given up, with reason and last worker", "max_dead_letters"),
)


@dataclass(frozen=True)
class Shard:
    """One endpoint's part of Redis."""

    endpoint: str
    number: int = SHARD

    @property
    def name(self) -> str:
        return f"{self.endpoint}.{self.number}"

    @property
    def tag(self) -> str:
        """The hash tag that every key begins with, itself KEYS[1] of every script."""
        return f"{{{self.name}}}"

    def key(self, rest: str) -> str:
        return f"{self.tag}:{rest}"

    @property
    def live(self) -> str:
        """Channel: what a turn appended, and which jobs to look at anew."""
        return self.key("live")

    @property
    def wake(self) -> str:
        """Channel: there is new work."""
        return self.key("wake")

    def new_id(self) -> str:
        """Id of a new job or session: 128 random bits after the shard's name."""
        return f"{self.name}-{token_hex(16)}"


def shard_of(text: str) -> Shard | None:
    """The shard that a job or session id names, or None for a text that is no such id."""
    match = _ID.fullmatch(text)
    return Shard(match[1], int(match[2])) if match else None


def key_kind(key: str) -> Key | None:
    """The kind of a whole key name, or None for one that KEYS lacks."""
    tag, _, rest = key.partition("}")
    rest = rest if tag.startswith("{") else ""
    return next((kind for kind in KEYS if _matches(kind, rest)), None)


def _matches(kind: Key, rest: str) -> bool:
    pattern = "".join(".+" if part.startswith("<") else re.escape(part) for part in re.split(r"(<\w+>)", kind.pattern))
    return re.fullmatch(pattern, rest, re.DOTALL) is not None
