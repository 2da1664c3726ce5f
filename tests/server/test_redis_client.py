"""One client of one Redis: what it does when the other side hangs, refuses, moves or is someone else."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mixtral_server.errors import RedisUnavailable, Unavailable
from mixtral_server.queue import JobQueue, QueueLimits
from mixtral_server.redis_client import RedisClient, redis_answers
from mixtral_server.redis_nodes import open_url
from support.fault_proxy import FaultProxy
from support.http import until
from support.ports import free_port
from support.power_loss import PowerLoss
from support.queue_bench import ENDPOINT, Bench
from support.redis import RedisProcess, connect, redis_binary
from support.redis_kinds import TlsRedis, wait_for

HANG_S = 9.0  # three times the 3 s in which a call must be answered


class Hanging:
    """A Redis on TCP behind a proxy, which can be stopped or cut off without a word."""

    def __init__(self, server: RedisProcess, proxy: FaultProxy) -> None:
        self._server, self._proxy = server, proxy

    def hang(self, how: str) -> None:
        if how == "stopped":
            os.kill(self._server.pid, signal.SIGSTOP)
        else:
            self._proxy.black_hole()

    def wake(self) -> None:
        os.kill(self._server.pid, signal.SIGCONT)
        self._proxy.heal()


@pytest.fixture(scope="module")
def tcp_redis() -> Iterator[tuple[RedisProcess, int]]:
    port = free_port()
    with RedisProcess(redis_binary("6.2"), "--port", str(port), "--bind", "127.0.0.1") as server:
        yield server, port


@pytest.fixture
async def hanging(tcp_redis: tuple[RedisProcess, int]) -> AsyncIterator[tuple[Hanging, RedisClient]]:
    server, port = tcp_redis
    async with FaultProxy(f"http://127.0.0.1:{port}") as proxy, connect(proxy.url.replace("http", "redis")) as client:
        hanging = Hanging(server, proxy)
        yield hanging, client
        hanging.wake()


@pytest.mark.parametrize("how", ["stopped", "cut off"])
async def test_redis_that_hangs_refuses_soon_then_at_once_and_is_back_when_it_answers(
    hanging: tuple[Hanging, RedisClient], how: str
) -> None:
    other_side, client = hanging
    await client.set("key", "kept")
    other_side.hang(how)
    async with asyncio.timeout(HANG_S):
        for _ in range(200):  # at the pace of the first they would take ten minutes
            with pytest.raises(RedisUnavailable, match="does not answer") as refused, redis_answers():
                await client.get("key")
            assert refused.value.retry_after_s
    assert client.is_away
    other_side.wake()
    await until(lambda: not client.is_away)
    assert await client.get("key") == "kept"


async def test_many_calls_at_once_on_a_redis_that_hangs_all_end_within_one_deadline(hanging: tuple[Hanging, RedisClient]) -> None:
    """Also those that wait for a connection behind those that hang."""
    other_side, client = hanging
    other_side.hang("stopped")
    async with asyncio.timeout(HANG_S):
        outcomes = await asyncio.gather(*(client.get("key") for _ in range(300)), return_exceptions=True)
    assert all(isinstance(one, Exception) for one in outcomes)


async def test_process_that_stood_still_finds_its_answer_and_no_alarm(hanging: tuple[Hanging, RedisClient]) -> None:
    _, client = hanging
    answer = asyncio.create_task(client.blpop(["list"], timeout=1))
    await asyncio.sleep(0.1)
    time.sleep(4.0)  # noqa: ASYNC251 - as on a loaded machine: longer than a call may take
    assert await answer is None
    assert not client.is_away


async def test_one_slow_call_among_quick_ones_is_no_sign_of_a_redis_that_is_away(hanging: tuple[Hanging, RedisClient]) -> None:
    _, client = hanging
    slow = asyncio.create_task(client.blpop(["list"], timeout=20))
    while not slow.done():
        await client.ping()
        assert not client.is_away
        await asyncio.sleep(0.05)
    with pytest.raises(RedisUnavailable), redis_answers():
        await slow


async def test_sync_of_two_seconds_is_waited_for(tmp_path: Path) -> None:
    """As Redis itself does with a slow disk, at strict."""
    power = PowerLoss(tmp_path)
    log = ("--appendonly", "yes", "--appendfsync", "always")
    with RedisProcess(redis_binary("7.0"), *log, environment=power.environment) as server:
        async with connect(server.url) as client:
            power.slow(2000)
            assert await client.set("key", "kept")
            assert not client.is_away
            power.slow(0)


# ------------------------------------------------------------------------------------------------ refusals of Redis


async def refused(redis: RedisClient, word: str) -> None:
    """Every way into the queue says so, as `not now`."""
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits()}), redis)
    with pytest.raises(RedisUnavailable, match=rf"\({word}\)|{word}") as error:
        await bench.put()
    assert (error.value.status, error.value.retry_after_s is not None) == (503, True)


@pytest.mark.parametrize("version", ["6.2", "7.0"])
async def test_replica_is_not_written_to(version: str) -> None:
    binary = redis_binary(version)
    with RedisProcess(binary, "--port", str(port := free_port())) as master, RedisProcess(binary) as replica:
        with replica.client() as client:
            client.replicaof("127.0.0.1", port)
            wait_for(lambda: client.info("replication")["master_link_status"] == "up", "the replica follows")
            client.config_set("replica-serve-stale-data", "no")
        async with connect(replica.url) as redis:
            await refused(redis, "READONLY")
            master.crash()
            with replica.client() as client:
                wait_for(lambda: client.info("replication")["master_link_status"] == "down", "the replica is alone")
            await refused(redis, "MASTERDOWN")


@pytest.mark.parametrize("version", ["6.2", "7.0"])
async def test_master_without_the_replicas_it_wants_takes_nothing(version: str) -> None:
    with RedisProcess(redis_binary(version), "--min-replicas-to-write", "1") as server:
        async with connect(server.url) as redis:
            await refused(redis, "NOREPLICAS")


def is_loading(server: RedisProcess) -> bool:
    with server.client() as client:
        client.set_retry(Retry(NoBackoff(), 0))  # else it asks on until it is loaded
        try:
            client.ping()
        except redis.BusyLoadingError:
            return True
        except redis.ConnectionError:
            pass  # it does not listen yet
    return False


@pytest.mark.parametrize("version", ["6.2", "7.0"])
async def test_redis_that_still_loads_its_log_is_asked_again_later(version: str) -> None:
    with RedisProcess(redis_binary(version), "--appendonly", "yes", "--key-load-delay", "100") as server:  # microseconds
        with server.client() as client, client.pipeline(transaction=False) as pipeline:
            for number in range(20_000):
                pipeline.set(f"key{number}", "value")
            pipeline.execute()
        server.crash()
        server.start(is_awaited=False)
        await until(lambda: is_loading(server))
        async with connect(server.url) as redis:
            await refused(redis, "BusyLoadingError")
        server.crash()


@pytest.mark.parametrize("version", ["6.2", "7.0"])
async def test_cluster_without_its_slots_is_down(version: str) -> None:
    with RedisProcess(redis_binary(version), "--port", str(free_port(below=50_000)), "--cluster-enabled", "yes") as server:
        async with connect(server.url) as redis:
            await refused(redis, "CLUSTERDOWN")


# ------------------------------------------------------------------------------------------------ TLS and users


@pytest.fixture(scope="module")
def tls() -> Iterator[TlsRedis]:
    with TlsRedis("someone", "~* &* +@all") as server:
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_tls_with_authority_and_certificate_is_served(tls: TlsRedis, host: str) -> None:
    async with open_url(tls.tls_url.replace("127.0.0.1", host)) as redis:
        assert await redis.at("").execute_command("ACL WHOAMI") == "someone"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("ca.crt", "other.crt"), "certificate verify failed"),
        (("client.", "none."), "the TLS files of --redis_url cannot be used: No such file or directory"),
        (("ssl_certfile", "db=0#"), "--redis_url has a # in it"),
        (("rediss://", "redis://"), "--redis_url has an option that redis:// does not take"),
        (
            ("someone:", "nobody:"),
            "refuses the user of --redis_url: .*correct user and password, or give it the rules in ",
        ),
        (("p%40ss", "other"), "refuses the user of --redis_url"),
    ],
)
async def test_tls_that_cannot_be_trusted_and_a_wrong_login_are_refused_without_the_password(
    tls: TlsRedis, change: tuple[str, str], sentence: str
) -> None:
    with pytest.raises(Unavailable, match=sentence) as refused:
        async with open_url(tls.tls_url.replace(*change)):
            pass
    assert "word" not in str(refused.value).replace("password", "")


async def test_client_without_a_certificate_is_refused_by_redis(tls: TlsRedis) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        async with open_url(tls.tls_url.partition("&ssl_certfile")[0]):
            pass


async def test_name_that_the_certificate_lacks_is_refused_unless_names_are_not_asked_for(tls: TlsRedis) -> None:
    elsewhere = tls.tls_url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(Unavailable, match=r"certificate verify failed.*127\.0\.0\.2"):
        async with open_url(elsewhere):
            pass
    for asked in ("ssl_check_hostname=false", "ssl_cert_reqs=none"):
        async with open_url(f"{elsewhere}&{asked}") as redis:
            assert await redis.at("").ping()
