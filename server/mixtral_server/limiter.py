"""How often someone may start something: token buckets in Redis, so that all replicas count together.

Decides when a bucket is empty and for how long. Leaves to auth.py whose bucket is asked and what is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_server.redis_client import redis_answers
from mixtral_server.redis_nodes import AnyRedis

TAG = "{limits}"
"""All buckets live in one slot of a Cluster."""

_TAKE = """
-- KEYS[1] bucket hash {left, at_us}   ARGV[1] size of the bucket = tokens per minute
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local size = tonumber(ARGV[1])
local us_per_token = 60000000 / size
local bucket = redis.call('HMGET', KEYS[1], 'left', 'at_us')
local left = tonumber(bucket[1]) or size
local at_us = tonumber(bucket[2]) or now_us
left = math.min(size, left + math.max(0, now_us - at_us) / us_per_token)
local wait_us = 0
if left >= 1 then left = left - 1 else wait_us = math.ceil((1 - left) * us_per_token) end
redis.call('HSET', KEYS[1], 'left', tostring(left), 'at_us', string.format('%.0f', now_us))
redis.call('PEXPIRE', KEYS[1], 61000)
return {math.floor(left), wait_us}
"""


@dataclass(frozen=True)
class Allowance:
    """What a bucket said: whole tokens left, and seconds until the next one when it was empty (else 0)."""

    per_minute: int
    left: int
    wait_s: float


class Limiter:
    def __init__(self, redis: AnyRedis) -> None:
        self._take = redis.at(TAG).register_script(_TAKE)

    async def take(self, name: str, per_minute: int) -> Allowance:
        """One token of the bucket `{limits}:<name>`, which holds per_minute at most and fills at that rate. Raises RedisUnavailable."""
        with redis_answers():
            left, wait_us = await self._take(keys=[f"{TAG}:{name}"], args=[per_minute])
        return Allowance(per_minute, int(left), int(wait_us) / 1e6)
