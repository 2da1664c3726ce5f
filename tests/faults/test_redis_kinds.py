"""Redis behind Sentinels and as a Cluster: masters die and lag, slots move, and no chat is lost, doubled or forked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.crc import key_slot

from mixtral_server.redis_nodes import open_url
from support.history import Chat, Readers
from support.house import BRISK, STEADY, House, Program
from support.http import until
from support.redis import RedisProcess
from support.redis_kinds import ClusterRedis, SentinelRedis

pytestmark = pytest.mark.timeout(240)

SLOT = key_slot(f"{{{STEADY}.0}}".encode())


async def started(readers: Readers, count: int, *, model: str, tokens: int = 60) -> list[Chat]:
    """Chats of which each reader has some tokens."""
    chats = [readers.start(f"chat {number}", seed=number, tokens=tokens, model=model) for number in range(count)]
    await asyncio.gather(*(chat.reach(5) for chat in chats))
    return chats


# ------------------------------------------------------------------------------------------------ Sentinels


@pytest.fixture(scope="module")
def sentinels() -> SentinelRedis:
    return SentinelRedis()


@pytest.fixture(scope="module")
def sentinel_house(sentinels: SentinelRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("sentinels"), on=sentinels) as house:
        yield house


@pytest.fixture
async def behind_sentinels(sentinel_house: House) -> AsyncIterator[tuple[House, Readers]]:
    sentinel_house.restore()
    async with Readers(sentinel_house.urls, sentinel_house.key("client")) as readers:
        yield sentinel_house, readers
    sentinel_house.dismiss()


async def test_chats_go_on_at_the_replica_that_the_sentinels_promote(
    sentinels: SentinelRedis, behind_sentinels: tuple[House, Readers]
) -> None:
    house, readers = behind_sentinels
    await house.hire(endpoint=STEADY)
    chats = await started(readers, 3, model=STEADY)
    promoted = sentinels.replica
    sentinels.master.crash()
    chats.append(readers.start("asked while there was no master", tokens=10, model=STEADY))
    await readers.ended(*chats)
    assert sentinels.master is promoted
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 4, "the outage took no chat from its worker"


async def test_replica_that_lagged_gets_the_lost_tokens_again_from_the_worker(
    sentinels: SentinelRedis, behind_sentinels: tuple[House, Readers]
) -> None:
    house, readers = behind_sentinels
    worker = await house.hire(endpoint=STEADY)
    chats = await started(readers, 3, model=STEADY, tokens=90)
    await lose_the_master(sentinels, chats)
    await readers.ended(*chats)
    assert worker.said().count("event=log_rewound") >= 3, "the promoted log asks for the offset that it lacks"
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 3


async def test_tokens_lost_with_master_and_worker_are_made_again_to_the_same_letter(
    sentinels: SentinelRedis, behind_sentinels: tuple[House, Readers]
) -> None:
    house, readers = behind_sentinels
    worker = await house.hire()
    chats = await started(readers, 3, model=BRISK, tokens=90)
    await lose_the_master(sentinels, chats, worker)
    await until(lambda: all(chat.rewinds == 1 for chat in chats))  # each reader was ahead of the log, and is told so
    await house.hire()
    await readers.ended(*chats)


async def lose_the_master(sentinels: SentinelRedis, chats: list[Chat], *killed: Program) -> None:
    """The replica stands still, readers get more tokens, then the master (and what is named) is gone for good."""
    sentinels.cut_off_replica()
    reached = [chat.offset for chat in chats]
    await until(lambda: all(chat.offset >= was + 8 for chat, was in zip(chats, reached, strict=True)))
    for program in killed:
        program.kill()
    sentinels.master.crash()


async def test_replica_that_would_throw_keys_away_as_master_is_warned_of(
    sentinels: SentinelRedis, behind_sentinels: tuple[House, Readers], caplog: pytest.LogCaptureFixture
) -> None:
    await warned_of(sentinels.url, sentinels.replica, caplog)


async def warned_of(url: str, node: RedisProcess, caplog: pytest.LogCaptureFixture) -> None:
    async with open_url(url):
        assert "redis_may_lose_jobs" not in caplog.text
    with node.client() as client:
        port = client.config_get("port")["port"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            async with open_url(url):
                assert f"redis_may_lose_jobs where=127.0.0.1:{port} maxmemory_policy=allkeys-lru" in caplog.text
        finally:
            client.config_set("maxmemory-policy", "noeviction")


# ------------------------------------------------------------------------------------------------ Cluster


@pytest.fixture(scope="module")
def cluster() -> ClusterRedis:
    return ClusterRedis()


@pytest.fixture(scope="module")
def cluster_house(cluster: ClusterRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("cluster"), on=cluster) as house:
        yield house


@pytest.fixture
async def on_cluster(cluster_house: House) -> AsyncIterator[tuple[House, Readers]]:
    cluster_house.restore()
    async with Readers(cluster_house.urls, cluster_house.key("client")) as readers:
        yield cluster_house, readers
    cluster_house.dismiss()


async def test_endpoints_live_on_different_nodes_of_a_cluster(cluster: ClusterRedis, on_cluster: tuple[House, Readers]) -> None:
    house, readers = on_cluster
    await house.hire(endpoint=STEADY)
    await house.hire(endpoint=BRISK)
    chats = [readers.start(f"chat {number}", seed=number, model=(STEADY, BRISK)[number % 2]) for number in range(6)]
    await readers.ended(*chats)
    names = []
    for node in cluster.nodes[:3]:
        with node.client() as client:
            names.append({key.partition("}")[0] for key in client.keys("*")})
    assert [{"{" + BRISK + ".0"} <= names[0], {"{" + STEADY + ".0"} <= names[1], names[2]] == [True, True, set()]


async def test_every_node_of_a_cluster_is_asked_whether_it_throws_keys_away(
    cluster: ClusterRedis, on_cluster: tuple[House, Readers], caplog: pytest.LogCaptureFixture
) -> None:
    for node in (cluster.nodes[2], cluster.nodes[3]):
        await warned_of(cluster.url, node, caplog)
        caplog.clear()


async def test_node_that_dies_pauses_its_own_endpoint_alone(cluster: ClusterRedis, on_cluster: tuple[House, Readers]) -> None:
    house, readers = on_cluster
    await house.hire(endpoint=STEADY)
    await house.hire(endpoint=BRISK)
    chats = await started(readers, 3, model=STEADY)
    others = await started(readers, 3, model=BRISK, tokens=30)
    cluster.owner(SLOT).crash()
    assert {house.a.readiness(), house.b.readiness()} == {200}, "a replica is ready while any endpoint's node answers"
    chats.append(readers.start("asked while the node was gone", tokens=10, model=STEADY))
    await readers.ended(*others)
    assert not any(chat.refusals for chat in others)
    await readers.ended(*chats)
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 4


async def test_slot_that_moves_under_load_pauses_its_endpoint_and_loses_nothing(
    cluster: ClusterRedis, on_cluster: tuple[House, Readers]
) -> None:
    house, readers = on_cluster
    await house.hire(endpoint=STEADY)
    chats = await started(readers, 3, model=STEADY, tokens=90)
    source, target = cluster.owner(SLOT), cluster.nodes[2]
    move = move_slot(cluster, source, target)
    next(move)
    async with readers.http.post(f"{house.a.url}/v1/jobs", json=chats[0].body) as answer:
        assert (answer.status, "ASK" in await answer.text()) == (503, True), "no script may see half of an endpoint's keys"
    list(move)
    chats.append(readers.start("asked at its new home", tokens=10, model=STEADY))
    await readers.ended(*chats)
    assert cluster.owner(SLOT) is target
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 4
    list(move_slot(cluster, target, source))
    await readers.ended(readers.start("and at its old one", tokens=10, model=STEADY))


def move_slot(cluster: ClusterRedis, source: RedisProcess, target: RedisProcess) -> Iterator[None]:
    """As `redis-cli --cluster reshard` does it: key by key, while others ask for them. Yields once, after the first few."""
    port = cluster.ports[cluster.nodes.index(target)]
    ids = [cluster.ids[cluster.nodes.index(node)] for node in (source, target)]
    with source.client() as old, target.client() as new:
        new.execute_command("CLUSTER", "SETSLOT", SLOT, "IMPORTING", ids[0])
        old.execute_command("CLUSTER", "SETSLOT", SLOT, "MIGRATING", ids[1])
        moved = 0
        while keys := old.execute_command("CLUSTER", "GETKEYSINSLOT", SLOT, 1):
            old.execute_command("MIGRATE", "127.0.0.1", port, keys[0], 0, 5000)
            moved += 1
            if moved == 5:
                yield
        assert moved > 5
        for node in (new, old):
            node.execute_command("CLUSTER", "SETSLOT", SLOT, "NODE", ids[1])
