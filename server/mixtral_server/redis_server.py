"""Which Redis we use: the one that --redis_url names, or one of our own that lives and ends with us.

Decides how it is found, started, watched, shared by two servers on one data folder, and what settings are refused or warned of.
Leaves to queue.py everything that is in it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from redis.asyncio import Redis

Durability = Literal["memory", "standard", "strict"]


def connect(url: str) -> Redis:
    """A client with decoded answers, a bounded pool and a deadline on every call. Does not connect yet."""
    raise NotImplementedError


@asynccontextmanager
async def open_redis(redis_url: str | None, data_dir: Path, *, durability: Durability = "standard") -> AsyncIterator[Redis]:
    """The client of redis_url, or of an embedded Redis under data_dir when redis_url is None or ""; checked and answering.

    Raises Unavailable with a sentence: no binary to be found, Redis older than 6.2, no answer.
    """
    raise NotImplementedError
    yield
