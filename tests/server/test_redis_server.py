"""A Redis that comes along: found, started, kept alive, shared, handed on, and gone when we are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions as redis_errors
from redis.asyncio import Redis

from mixtral_server.errors import Unavailable
from mixtral_server.redis_server import Durability, EmbeddedRedis, find_redis, open_redis, version_of
from support.redis import VERSIONS, RedisProcess, connect, redis_binary

HANG_S = 30.0


@pytest.fixture(params=VERSIONS)
def binary(request: pytest.FixtureRequest) -> Path:
    return redis_binary(request.param)


@contextlib.asynccontextmanager
async def client_of(embedded: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = connect(embedded.url)
    yield client
    await client.aclose()


async def answers(client: Redis) -> None:
    """Wait until it answers again, after a restart."""
    async with asyncio.timeout(HANG_S):
        while True:
            try:
                await client.ping()
                return
            except (redis_errors.ConnectionError, redis_errors.TimeoutError):
                await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    """Not so for a zombie that nobody has waited for."""
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return said.strip() != "" and not said.startswith("Z")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.02)


async def gone(pid: int) -> None:
    await until(lambda: not is_running(pid))


# ------------------------------------------------------------------------------------------------ start and end


async def test_it_answers_as_soon_as_it_is_entered_and_ends_with_its_server(tmp_path: Path, binary: Path) -> None:
    async with EmbeddedRedis(tmp_path, binary=binary) as embedded, client_of(embedded) as client:
        assert await client.ping()
        pid = embedded.pid
        assert pid
        assert (await client.info("server"))["process_id"] == pid
    assert not is_running(pid)


async def test_it_is_for_us_alone(tmp_path: Path, binary: Path) -> None:
    async with EmbeddedRedis(tmp_path, binary=binary) as embedded, client_of(embedded) as client:
        folder = tmp_path / "redis"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "redis.sock").stat().st_mode) == 0o600
        assert (await client.config_get("port"))["port"] == "0"
        assert embedded.pid
        assert os.getsid(embedded.pid) != os.getsid(0)  # Ctrl-C reaches the server alone


@pytest.mark.parametrize(
    ("durability", "appendonly", "appendfsync"), [("memory", "no", None), ("standard", "yes", "everysec"), ("strict", "yes", "always")]
)
async def test_durability_is_what_redis_is_told(
    tmp_path: Path, binary: Path, durability: Durability, appendonly: str, appendfsync: str | None
) -> None:
    async with EmbeddedRedis(tmp_path, durability=durability, binary=binary) as embedded, client_of(embedded) as client:
        said = await client.config_get("*")
    assert said["appendonly"] == appendonly
    assert appendfsync in (None, said["appendfsync"])
    assert (said["maxmemory-policy"], said["save"]) == ("noeviction", "")


async def test_what_was_written_is_there_after_a_restart_of_the_server(tmp_path: Path, binary: Path) -> None:
    async with EmbeddedRedis(tmp_path, binary=binary) as embedded, client_of(embedded) as client:
        await client.set("key", "kept")
    async with EmbeddedRedis(tmp_path, binary=binary) as embedded, client_of(embedded) as client:
        assert await client.get("key") == "kept"


async def test_killed_redis_is_started_again_with_all_that_was_appended(tmp_path: Path, binary: Path) -> None:
    async with EmbeddedRedis(tmp_path, binary=binary) as embedded, client_of(embedded) as client:
        async with client.pipeline(transaction=False) as pipeline:
            for number in range(20_000):
                pipeline.xadd("log", {"n": number}, id=f"{number + 1}-0")
            await pipeline.execute()
        pid = embedded.pid
        assert pid
        while (facts := await client.info("persistence"))["aof_pending_bio_fsync"] or facts["aof_buffer_length"]:
            pass  # killed in the middle of a sync it may lose what came since: tests/faults/test_power_loss.py
        os.kill(pid, signal.SIGKILL)
        await gone(pid)
        await answers(client)
        assert await client.xlen("log") == 20_000
        assert embedded.pid != pid


async def test_it_is_started_again_however_often_it_dies(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path, binary=redis_binary("6.2")) as embedded, client_of(embedded) as client:
        pids = set()
        for _ in range(3):
            assert embedded.pid
            pids.add(embedded.pid)
            os.kill(embedded.pid, signal.SIGKILL)
            await gone(embedded.pid)
            await answers(client)
        assert embedded.pid not in pids


OWNER = """
import asyncio, sys
from pathlib import Path
from mixtral_server.redis_server import EmbeddedRedis

async def main():
    async with EmbeddedRedis(Path(sys.argv[1]), binary=Path(sys.argv[2])) as embedded:
        print(embedded.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def other_server(data_dir: Path, binary: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A server process of its own that owns the Redis of data_dir; with the pid of that Redis."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(data_dir), str(binary), stdout=asyncio.subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout
        async with asyncio.timeout(HANG_S):
            yield process, int(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_server_killed_with_9_leaves_no_redis_behind(tmp_path: Path, binary: Path) -> None:
    async with other_server(tmp_path, binary) as (server, pid):
        assert is_running(pid)
        server.kill()
        await server.wait()
        if sys.platform != "linux":  # no kernel ends it with its server; the next server does
            async with EmbeddedRedis(tmp_path, binary=binary):
                pass
        await gone(pid)


async def test_a_redis_left_behind_is_ended_before_ours_starts(tmp_path: Path, binary: Path) -> None:
    """Where no kernel ends it with its server: it still holds the log."""
    folder = tmp_path / "redis"
    folder.mkdir(mode=0o700)
    socket = folder / "redis.sock"
    orphan = await asyncio.create_subprocess_exec(
        *(str(binary), "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--appendonly", "yes", "--save", ""),
        stdout=asyncio.subprocess.DEVNULL,
    )
    left = connect(f"unix://{socket}")
    await answers(left)
    await left.set("key", "kept")
    await left.aclose()
    async with EmbeddedRedis(tmp_path, binary=binary) as embedded, client_of(embedded) as client:
        assert await orphan.wait() == 0
        assert embedded.pid != orphan.pid
        assert await client.get("key") == "kept"


# ------------------------------------------------------------------------------------------------ sharing


async def test_two_servers_on_one_data_folder_share_one_redis(tmp_path: Path, binary: Path) -> None:
    async with EmbeddedRedis(tmp_path, binary=binary) as owner, EmbeddedRedis(tmp_path, binary=binary) as guest:
        assert owner.pid
        assert guest.pid is None
        async with client_of(owner) as one, client_of(guest) as other:
            await one.set("key", "shared")
            assert await other.get("key") == "shared"


async def test_servers_that_start_at_once_share_one_redis(tmp_path: Path) -> None:
    servers = [EmbeddedRedis(tmp_path, binary=redis_binary("6.2")) for _ in range(4)]
    await asyncio.gather(*(server.__aenter__() for server in servers))
    assert sum(server.pid is not None for server in servers) == 1
    for server in servers:
        await server.__aexit__(None, None, None)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_a_guest_takes_over_when_the_owner_is_gone_and_nothing_is_lost(tmp_path: Path, binary: Path, end: signal.Signals) -> None:
    async with other_server(tmp_path, binary) as (owner, pid), EmbeddedRedis(tmp_path, binary=binary) as guest, client_of(guest) as client:
        await client.set("key", "kept")
        assert guest.pid is None
        owner.send_signal(end)
        await owner.wait()
        await until(lambda: guest.pid is not None)
        await answers(client)
        assert await client.get("key") == "kept"
        assert (await client.info("server"))["process_id"] == guest.pid != pid


# ------------------------------------------------------------------------------------------------ refusals


async def test_a_long_path_gets_a_short_socket_of_its_own(tmp_path: Path, binary: Path) -> None:
    data_dir = tmp_path / ("a" * 60) / ("b" * 60)
    async with EmbeddedRedis(data_dir, binary=binary) as owner, EmbeddedRedis(data_dir, binary=binary) as guest:
        async with client_of(guest) as client:
            assert await client.ping()
        socket = Path(owner.url.removeprefix("unix://"))
        assert len(os.fsencode(socket)) <= 100
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert (data_dir / "redis").is_dir()
    shutil.rmtree(socket.parent)


async def test_a_log_of_redis_7_is_not_passed_over_by_6_2(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path, binary=redis_binary("7.0")) as embedded, client_of(embedded) as client:
        await client.set("key", "kept")
    with pytest.raises(Unavailable, match=r"was written by Redis 7 or later and .* is 6\.2\.\d+, which cannot read it"):
        async with EmbeddedRedis(tmp_path, binary=redis_binary("6.2")):
            pass


async def test_a_log_of_6_2_is_read_by_7(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path, binary=redis_binary("6.2")) as embedded, client_of(embedded) as client:
        await client.set("key", "kept")
    async with EmbeddedRedis(tmp_path, binary=redis_binary("7.0")) as embedded, client_of(embedded) as client:
        assert await client.get("key") == "kept"


async def test_a_redis_that_cannot_start_is_refused_in_its_own_words(tmp_path: Path, binary: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    log = folder / "appendonly.aof" if version_of(binary) < (7,) else folder / "appendonlydir"
    log.write_text("not a log")
    with pytest.raises(Unavailable, match=f"{binary} did not start in {folder}: .*(AOF|append).*"):
        async with EmbeddedRedis(tmp_path, binary=binary):
            pass


async def test_a_data_folder_that_cannot_be_made_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be made for Redis: Not a directory; give another --data_dir"):
        async with EmbeddedRedis(tmp_path / "file"):
            pass


def program(folder: Path, name: str, says: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / name).chmod(0o755)


def test_redis_on_path_comes_first_then_valkey_then_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis() == redis_binary("6.2")
    program(tmp_path, "valkey-server", "Valkey server v=8.0.1 sha=0")
    assert find_redis() == tmp_path / "valkey-server"
    program(tmp_path, "redis-server", "Redis server v=7.4.0 sha=0")
    assert find_redis() == tmp_path / "redis-server"


def test_a_redis_that_is_too_old_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path, "redis-server", "Redis server v=5.0.14 sha=0")
    assert find_redis() == redis_binary("6.2")


def test_without_any_redis_one_sentence_says_how_to_install_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(Unavailable, match=r"no redis-server or valkey-server is on PATH.*apt-get install redis-server.*brew install redis"):
        find_redis()
    program(tmp_path, "redis-server", "Redis server v=5.0.14 sha=0")
    with pytest.raises(Unavailable, match=r"found only .*redis-server is 5\.0\.14; 6\.2 is the oldest that will do"):
        find_redis()


# ------------------------------------------------------------------------------------------------ one that is named


async def test_a_named_redis_is_used_and_left_running(redis_process: RedisProcess, tmp_path: Path) -> None:
    async with open_redis(redis_process.url, tmp_path) as client:
        assert (await client.info("server"))["process_id"] == redis_process.pid
    assert is_running(redis_process.pid)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("redis_url", [None, ""])
async def test_without_a_url_redis_is_embedded(tmp_path: Path, redis_url: str | None) -> None:
    async with open_redis(redis_url, tmp_path, durability="memory") as client:
        assert (await client.config_get("unixsocket"))["unixsocket"] == str(tmp_path / "redis" / "redis.sock")


async def test_a_named_redis_that_does_not_answer_is_said_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"Redis at redis://127\.0\.0\.1:1 does not answer") as refused:
        async with open_redis("redis://user:secret@127.0.0.1:1", tmp_path):
            pass
    assert "secret" not in str(refused.value)


async def test_a_url_of_another_kind_is_refused_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"--redis_url must begin with unix://.*; got http://") as refused:
        async with open_redis("http://user:secret@host", tmp_path):
            pass
    assert "secret" not in str(refused.value)


async def test_an_eviction_policy_that_loses_jobs_is_warned_of(
    redis: Redis, redis_process: RedisProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with open_redis(redis_process.url, tmp_path):
        assert caplog.records == []
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        async with open_redis(redis_process.url, tmp_path):
            assert "maxmemory_policy=allkeys-lru" in caplog.text
            assert "CONFIG SET maxmemory-policy noeviction" in caplog.text
    finally:
        await redis.config_set("maxmemory-policy", "noeviction")


async def cancelled_at_every_step(call: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """A task that calls on and on must end when it is cancelled, whichever step of the call it is at."""

    async def call_on_and_on() -> None:
        while True:
            await call()

    for steps in range(60):
        task = asyncio.create_task(call_on_and_on())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        _, pending = await asyncio.wait({task}, timeout=HANG_S)
        assert not pending, f"cancelled after {steps} steps, it went on"
        assert task.cancelled()


async def test_a_call_can_be_cancelled_at_any_moment(redis_process: RedisProcess) -> None:
    """The client's own writes swallow a cancellation that comes at the wrong step."""
    client = connect(redis_process.url)

    async def call() -> None:
        await client.ping()
        await client.connection_pool.disconnect()  # so that the next one connects anew

    await cancelled_at_every_step(call)
    await client.aclose()


async def test_a_server_can_end_at_any_moment_of_a_start(tmp_path: Path, binary: Path) -> None:
    async with EmbeddedRedis(tmp_path, binary=binary) as embedded:
        await cancelled_at_every_step(embedded._state)
