"""Lua scripts from lua/, each put together from its files, run on the node that has the endpoint's keys.

Decides how a script is made and called. Leaves what scripts do to lua/ and what their answers mean to the modules that name them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from redis import exceptions as redis_errors

from mixtral_server.keys import Shard
from mixtral_server.redis_client import redis_answers
from mixtral_server.redis_nodes import AnyRedis

LIFE = ("common", "share", "line", "rates", "anew", "life")
"""What a script stands on that moves jobs. Redis runs all of a script at every call: what a script does not need only costs time."""


class Scripts:
    def __init__(self, redis: AnyRedis, files_of: Mapping[str, Sequence[str]]) -> None:
        """files_of: script → the files in lua/ that make it up, in this order."""
        self._redis = redis
        self._texts = {name: _text(files) for name, files in files_of.items()}
        self._hashes = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._texts.items()}

    async def load(self, shard: Shard) -> None:
        """Have them at hand at the shard's node. Raises RedisUnavailable."""
        with redis_answers():
            for text in self._texts.values():
                await self._redis.at(shard.tag).script_load(text)

    async def run(self, name: str, shard: Shard, *args: str | bytes | int | float) -> Any:
        """Raises RedisUnavailable."""
        redis = self._redis.at(shard.tag)
        with redis_answers():
            try:
                return await redis.run_script("EVALSHA", self._hashes[name], 1, shard.tag, *args)
            except redis_errors.NoScriptError:  # a Redis that was started anew, or took over
                await redis.script_load(self._texts[name])
                return await redis.run_script("EVALSHA", self._hashes[name], 1, shard.tag, *args)


def _text(files: Sequence[str]) -> str:
    folder = resources.files("mixtral_server") / "lua"
    return "\n".join((folder / f"{name}.lua").read_text("utf-8") for name in files)
