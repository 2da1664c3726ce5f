"""Which node to ask: the one Redis of a URL, the master that Sentinels name, or the node of a Cluster that has a slot.

Decides how nodes are found and found again after a failover, and what is refused or warned of at the start. Leaves what a URL may say to
redis_url.py and what one client does to redis_client.py.

Every endpoint lives in one slot, so a Cluster is to us some plain Redis servers whose addresses may change: `at(key)` is the client of the
one that has the key. A command is never followed into a slot that is half moved (ASK): a script would find only some of its keys there.
KEYS[1] of every script is a name that no key has, so a slot on its way answers every script with ASK, and its endpoint waits until it has
arrived.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

from redis import exceptions as redis_errors
from redis.crc import key_slot

from mixtral_server.errors import Unavailable
from mixtral_server.redis_client import CALL_S, Address, Home, RedisClient, TcpConnection, UnixConnection, connection_options, tls_context
from mixtral_server.redis_url import Login, RedisUrl, parse_redis_url

LOG = logging.getLogger(__name__)

T = TypeVar("T")

OLDEST = (6, 2)

# ---------------------------------------------------------------------------------------------- finding the node


async def _first(asked: Sequence[Coroutine[Any, Any, T | None]], nobody: str) -> T:
    """The first answer that is one; the others are not waited for. Raises redis.ConnectionError, which begins with `nobody`."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    why: Exception | None = None
    try:
        for next_one in asyncio.as_completed(tasks):
            try:
                if (answer := await next_one) is not None:
                    return answer
            except (redis_errors.RedisError, OSError) as error:
                why = error
        raise redis_errors.ConnectionError(f"{nobody} ({why})" if why else nobody)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(address: Address, login: Login, tls: ssl.SSLContext | None, *command: str) -> Any:
    """One question over a connection of its own."""
    connection = TcpConnection(host=address[0], port=address[1], **connection_options(login, tls))
    try:
        async with asyncio.timeout(CALL_S):
            await connection.send_command(*command)
            return await connection.read_response()
    except TimeoutError as error:
        raise redis_errors.TimeoutError(f"{address[0]}:{address[1]} does not answer within {CALL_S:g} s") from error
    finally:
        await connection.disconnect(nowait=True)


class _Sentinels:
    """Where the master is, by the Sentinels that answer."""

    def __init__(self, url: RedisUrl, tls: ssl.SSLContext | None) -> None:
        self._url = url
        self._tls = tls

    async def find(self, lost: Address | None) -> Address:
        asked = [self._ask(address, "GET-MASTER-ADDR-BY-NAME") for address in self._url.hosts]
        host, port = await _first(asked, f"no Sentinel of {self._url.shown} says where its master is")
        return host, int(port)

    async def nodes(self) -> list[Address]:
        """The master and its replicas, one of which may be the next master."""
        master = await self.find(None)
        rows = await _first([self._ask(address, "REPLICAS") for address in self._url.hosts], "no Sentinel names the replicas")
        records = [dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
        return [master, *((record["ip"], int(record["port"])) for record in records)]

    async def _ask(self, address: Address, question: str) -> Any:
        return await _ask(address, self._url.sentinel_login, self._tls, "SENTINEL", question, self._url.master)


class _Nodes:
    """Which node of a Cluster has which slot, by the nodes that answer."""

    def __init__(self, url: RedisUrl, tls: ssl.SSLContext | None) -> None:
        self._url = url
        self._tls = tls
        self._known: list[Address] = list(url.hosts)

    async def find(self, slot: int, lost: Address | None) -> Address:
        others = [address for address in self._known if address != lost]
        try:
            ranges = await self._ranges(others)  # a node that is cut off from the others does not know that it was replaced
        except redis_errors.ConnectionError:
            ranges = await self._ranges(self._known)
        for first, last, nodes in ranges:
            if first <= slot <= last:
                return nodes[0]
        raise redis_errors.ConnectionError(f"no node of {self._url.shown} has slot {slot}")

    async def nodes(self) -> list[Address]:
        return list(dict.fromkeys(node for _, _, nodes in await self._ranges(self._known) for node in nodes))

    async def _ranges(self, asked: Sequence[Address]) -> list[tuple[int, int, list[Address]]]:
        """(first slot, last slot, master and replicas) of each range."""
        ranges = await _first([self._ask(address) for address in asked], f"no node of {self._url.shown} answers")
        self._known = list(dict.fromkeys([*(node for _, _, nodes in ranges for node in nodes), *self._url.hosts]))
        return ranges

    async def _ask(self, address: Address) -> list[tuple[int, int, list[Address]]] | None:
        rows = await _ask(address, self._url.login, self._tls, "CLUSTER", "SLOTS")
        return [(first, last, [(node[0] or address[0], int(node[1])) for node in nodes]) for first, last, *nodes in rows] or None


class ClusterClient:
    """A Cluster as the clients of the slots that are asked for."""

    def __init__(self, nodes: _Nodes, options: dict[str, Any]) -> None:
        self._nodes = nodes
        self._options = options
        self._clients: dict[int, RedisClient] = {}

    def at(self, key: str) -> RedisClient:
        slot = key_slot(key.encode())
        if slot not in self._clients:
            self._clients[slot] = RedisClient(TcpConnection, home=Home(partial(self._nodes.find, slot)), **self._options)
        return self._clients[slot]

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.aclose()


# ---------------------------------------------------------------------------------------------- all kinds

AnyRedis: TypeAlias = RedisClient | ClusterClient


def reach(url: RedisUrl) -> tuple[AnyRedis, _Sentinels | _Nodes | None]:
    """The client, which does not connect yet, and who knows all nodes where there are several. Raises ValueError with a sentence."""
    tls = tls_context(url.tls)
    options = connection_options(url.login, tls)
    match url.kind:
        case "socket":
            return RedisClient(UnixConnection, path=url.path, db=url.database, **options), None
        case "one":
            host, port = url.hosts[0]
            return RedisClient(TcpConnection, host=host, port=port, db=url.database, **options), None
        case "sentinel":
            sentinels = _Sentinels(url, tls)
            return RedisClient(TcpConnection, home=Home(sentinels.find), db=url.database, **options), sentinels
        case "cluster":
            nodes = _Nodes(url, tls)
            return ClusterClient(nodes, options), nodes


@asynccontextmanager
async def open_url(text: str) -> AsyncIterator[AnyRedis]:
    """The client of a URL, checked and answering. Raises Unavailable with a sentence."""
    try:
        url = parse_redis_url(text)
        redis, several = reach(url)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    try:
        await _check(url, redis, several)
        yield redis
    finally:
        await redis.aclose()


async def _check(url: RedisUrl, redis: AnyRedis, several: _Sentinels | _Nodes | None) -> None:
    """Raises Unavailable for a Redis that does not answer or is too old; warns of one that throws keys away, each node of several."""
    try:
        if isinstance(redis, RedisClient):
            judge(await redis.info(), url.shown)
        for host, port in await several.nodes() if several else ():
            where = f"{host}:{port}"
            try:
                judge(_facts(await _ask((host, port), url.login, tls_context(url.tls), "INFO")), where)
            except redis_errors.RedisError as error:
                LOG.warning("redis_node_not_checked where=%s: %s", where, error)
    except (redis_errors.AuthenticationError, redis_errors.NoPermissionError) as error:
        raise Unavailable(
            f"Redis at {url.shown} refuses the user of --redis_url: {error}; correct user and password, or give it the rules in "
            "docs/operations.md"
        ) from error
    except redis_errors.RedisError as error:
        raise Unavailable(f"Redis at {url.shown} does not answer: {error}; start it, or correct --redis_url") from error


def _facts(said: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in said.splitlines() if ":" in line)


def judge(facts: Mapping[str, Any], where: str) -> None:
    """facts: what INFO says. Raises Unavailable for a Redis that is too old; warns of one that throws keys away."""
    version = tuple(int(part) for part in str(facts["redis_version"]).split(".")[:2])
    if version < OLDEST:
        raise Unavailable(f"Redis at {where} is version {facts['redis_version']}; 6.2 is the oldest that has what the queue needs")
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        LOG.warning(
            "redis_may_lose_jobs where=%s maxmemory_policy=%s: at its memory limit this Redis throws away jobs and tokens; "
            "run CONFIG SET maxmemory-policy noeviction, and write it into redis.conf",
            where,
            policy,
        )
