"""What a follower is promised: every token once, in order, then one end, whatever the live channel loses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

import mixtral_server.follower
import mixtral_server.redis_client
from mixtral_client.protocol import Frame, FrameError, JobEvent, TokenEvent, event_id, ids_crc, parse_event_id
from mixtral_server.cursor import Cursor, Followed, Tokens
from mixtral_server.errors import JobNotFound, RedisUnavailable
from mixtral_server.follower import MAX_KEPT_TOKENS
from mixtral_server.queue import JobQueue, QueueLimits
from mixtral_server.records import Entry, Place, Snapshot
from mixtral_server.relay import Relay
from support.queue_bench import ENDPOINT, Bench, Hand, frame
from support.redis import RedisProcess, connect, redis_binary

HANG_S = 30.0


@pytest.fixture
async def relay(redis: Redis, queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Relay]:
    """One that never looks at the log for want of news: all comes by the live channel, or because it was cut."""
    monkeypatch.setattr(mixtral_server.follower, "LOOK_EVERY_S", 3600.0)
    async with Relay(redis, queue) as relay:
        yield relay


@pytest.fixture
def deaf_relay(redis: Redis, queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> Relay:
    """One whose live channel brings nothing: it has only its looks at the log."""
    monkeypatch.setattr(mixtral_server.follower, "LOOK_EVERY_S", 0.02)
    return Relay(redis, queue)


@dataclass(frozen=True)
class Told:
    """One event, one token at most."""

    event: JobEvent
    id: str | None = None
    ids: tuple[int, ...] = ()


def one_by_one(batch: Sequence[Followed]) -> Iterator[Told]:
    for one in batch:
        if isinstance(one, Tokens):
            for token, (offset, crc, text) in zip(one.ids, one.rows(), strict=True):
                yield Told(TokenEvent(offset=offset, text=text), event_id(offset, crc), (token,))
        else:
            yield Told(one.event, one.id)


@pytest.fixture(params=[False, True], ids=["batch", "sink"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is run with readers that ask for all, and with readers that are given most."""
    monkeypatch.setattr(Reader, "has_sink", request.param)


class Reader:
    """A client: keeps all it was told, and checks it as it comes."""

    has_sink = False

    def __init__(self, relay: Relay, job: str, after: int = 0, crc: int | None = None) -> None:
        self.events: list[Told] = []
        self.text = ""
        self._follow = relay.follow(job, after, crc)
        self._sunk = 0
        self._task = asyncio.create_task(self._read())
        self._changed = asyncio.Event()

    async def _read(self) -> None:
        with self._follow as follower:
            follower.sink = (lambda tokens: partial(self._sink, tokens)) if self.has_sink else None
            while not follower.is_over:
                self._take(await follower.batch(HANG_S))

    def _sink(self, tokens: Tokens) -> bool:
        """Takes two frames of three."""
        self._sunk += 1
        if is_taken := self._sunk % 3 > 0:
            self._take([tokens])
        return is_taken

    def _take(self, batch: Sequence[Followed]) -> None:
        for told in one_by_one(batch):
            self.events.append(told)
            match told.event.event:
                case "token":
                    self.text += told.event.text
                case "rewind":
                    self.text = self.text[: told.event.to]
            self._changed.set()

    @property
    def kinds(self) -> list[str]:
        return [followed.event.event for followed in self.events]

    @property
    def tokens(self) -> list[Told]:
        return [followed for followed in self.events if followed.event.event == "token"]

    async def until(self, *kinds: str) -> None:
        """Wait until the last events are these."""
        async with asyncio.timeout(HANG_S):
            while self.kinds[-len(kinds) :] != list(kinds):
                await self._next()

    async def until_text(self, text: str) -> None:
        async with asyncio.timeout(HANG_S):
            while self.text != text:
                await self._next()

    async def _next(self) -> None:
        self._changed.clear()
        change = asyncio.create_task(self._changed.wait())
        await asyncio.wait({self._task, change}, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()
        if self._task.done() and not self._changed.is_set():
            await self._task
            raise AssertionError(f"the events ended with {self.kinds[-3:]}, {self.text!r}")

    async def end(self) -> list[Told]:
        async with asyncio.timeout(HANG_S):
            await self._task
        return self.events

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


async def test_a_follower_gets_every_token_once_in_order_and_then_one_end(bench: Bench, relay: Relay) -> None:
    job_id = await bench.put()
    reader = Reader(relay, job_id)
    await reader.until("queued")
    worker = await bench.worker()
    [job] = await worker.take()
    for offset, letters in ((1, "a"), (2, "bcd"), (5, "ef")):
        await worker.turn(frame(job, offset, letters))
    await worker.turn(frame(job, 7, "g", finish="stop", prompt_tokens=3))
    await reader.end()
    assert reader.kinds == ["queued", *["token"] * 7, "done"]
    assert reader.text == "abcdefg"
    assert [followed.event.offset for followed in reader.tokens] == list(range(1, 8))  # type: ignore[union-attr]
    assert [followed.ids for followed in reader.tokens] == [(ord(letter),) for letter in "abcdefg"]
    done = reader.events[-1].event
    assert done.event == "done"
    assert (done.finish, done.usage.completion_tokens, done.usage.prompt_tokens) == ("stop", 7, 3)


async def test_event_ids_name_offset_and_the_ids_so_far(bench: Bench, relay: Relay) -> None:
    job_id, worker = await bench.put(), await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "ab"))
    reader = Reader(relay, job_id)
    await reader.until_text("ab")
    await worker.turn(frame(job, 3, "c", finish="stop"))
    await reader.end()
    ids = [ord(letter) for letter in "abc"]
    assert [followed.id for followed in reader.tokens] == [event_id(n, ids_crc(ids[:n])) for n in (1, 2, 3)]


@pytest.mark.parametrize("after", range(7))
async def test_a_reader_resumes_after_any_event_exactly(bench: Bench, relay: Relay, after: int) -> None:
    job_id, worker = await bench.put(), await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc"))
    await worker.turn(frame(job, 4, "def"))
    crc = ids_crc(map(ord, "abcdef"[:after]))
    readers = [Reader(relay, job_id, after, crc), Reader(relay, job_id, after)]
    for reader in readers:
        await reader.until_text("abcdef"[after:])
    await worker.turn(frame(job, 7, "g", finish="stop"))
    for reader in readers:
        await reader.end()
        assert reader.text == "abcdefg"[after:]
        assert reader.kinds == [*["token"] * (7 - after), "done"]
        assert reader.tokens[-1].id == event_id(7, ids_crc(map(ord, "abcdefg")))


@pytest.mark.parametrize(("after", "crc"), [(4, ids_crc(map(ord, "abcd"))), (4, None), (2, ids_crc(map(ord, "aX"))), (3, 0)])
async def test_a_reader_ahead_of_or_beside_the_log_is_told_to_rewind(bench: Bench, relay: Relay, after: int, crc: int | None) -> None:
    job_id, worker = await bench.put(), await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc", finish="stop"))
    events = await Reader(relay, job_id, after, crc).end()
    assert [followed.event.event for followed in events] == ["rewind", "token", "token", "token", "done"]
    assert events[0].event.to == 0  # type: ignore[union-attr]
    assert parse_event_id(events[0].id or "") == (0, 0)


async def test_a_follower_of_an_ended_job_gets_all_of_it(bench: Bench, relay: Relay) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc", finish="length"))
    reader = Reader(relay, job_id)
    assert len(await reader.end()) == 4
    assert reader.text == "abc"


async def test_every_way_to_end_is_one_terminal_event(bench: Bench, relay: Relay) -> None:
    worker = await bench.worker()
    failed, cancelled, expired = [await bench.put(queue_timeout_s=60) for _ in range(3)]
    readers = [Reader(relay, job) for job in (failed, cancelled, expired)]
    for reader in readers:
        await reader.until("queued")
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "a", error=FrameError(code="numerical_error", message="met NaN")))
    await bench.queue.cancel(cancelled)
    await bench.queue.reap(ENDPOINT)
    await bench.redis.zadd(bench.shard.key("deadlines"), {expired: 1})
    await bench.queue.reap(ENDPOINT)
    last = [(await reader.end())[-1].event for reader in readers]
    assert [event.event for event in last] == ["error", "done", "done"]
    assert last[0].event == "error"
    assert (last[0].error.code, last[0].error.message) == ("numerical_error", "met NaN")
    assert [event.finish for event in last if event.event == "done"] == ["cancelled", "expired"]
    assert all(sum(kind in ("done", "error") for kind in reader.kinds) == 1 for reader in readers)


async def test_a_waiting_follower_hears_its_place_when_it_changes(bench: Bench, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtral_server.follower, "MIN_PLACE_EVERY_S", 0.02)
    monkeypatch.setattr(mixtral_server.follower, "PLACE_EVERY_S", 0.0)
    jobs = [await bench.put() for _ in range(3)]
    asked = asyncio.Semaphore(0)
    place = JobQueue.place

    async def counted(queue: JobQueue, job_id: str) -> Place | None:
        asked.release()
        return await place(queue, job_id)

    monkeypatch.setattr(JobQueue, "place", counted)
    reader = Reader(relay, jobs[2])
    for _ in range(5):  # it asks again and again, and says nothing while nothing changes
        await asked.acquire()
    for told, job in enumerate(jobs[:2], 1):
        assert len(reader.events) == told
        await bench.queue.cancel(job)
        async with asyncio.timeout(HANG_S):
            while len(reader.events) == told:
                await reader._next()
    assert [followed.event.position for followed in reader.events] == [3, 2, 1]  # type: ignore[union-attr]
    await reader.leave()


async def test_a_moved_job_tells_its_follower_and_goes_on(bench: Bench, relay: Relay) -> None:
    job_id, dead = await bench.put(), await bench.worker()
    reader = Reader(relay, job_id)
    await reader.until("queued")
    [job] = await dead.take()
    await dead.turn(frame(job, 1, "abc"))
    await reader.until_text("abc")
    await bench.lapse(dead)
    await bench.queue.reap(ENDPOINT)
    await reader.until("moved", "queued")
    worker = await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 4, "de", finish="stop"))
    await reader.end()
    assert reader.text == "abcde"
    moved = next(followed.event for followed in reader.events if followed.event.event == "moved")
    assert moved.attempt == 2
    assert reader.kinds.count("moved") == 1


async def test_many_followers_of_one_job_each_get_all(bench: Bench, relay: Relay) -> None:
    job_id, worker = await bench.put(max_tokens=100), await bench.worker()
    readers = [Reader(relay, job_id) for _ in range(20)]
    [job] = await worker.take()
    for offset in range(1, 50):
        await worker.turn(frame(job, offset, "x"))
    await worker.turn(frame(job, 50, "y", finish="stop"))
    for reader in readers:
        await reader.end()
        assert reader.text == "x" * 49 + "y"
    assert relay.followers == []


async def test_jobs_do_not_mix(bench: Bench, relay: Relay) -> None:
    worker = await bench.worker()
    readers = {job: Reader(relay, job) for job in [await bench.put() for _ in range(5)]}
    jobs = await worker.take(5)
    await worker.turn(*(frame(job, 1, chr(97 + number) * 3) for number, job in enumerate(jobs)))
    await worker.turn(*(frame(job, 4, "", finish="stop") for job in jobs))
    for number, job in enumerate(jobs):
        await readers[job.id].end()
        assert readers[job.id].text == chr(97 + number) * 3


async def test_a_deaf_follower_still_gets_everything(bench: Bench, deaf_relay: Relay) -> None:
    """A lost message, even the last, must not hang a reader."""
    job_id, worker = await bench.put(), await bench.worker()
    reader = Reader(deaf_relay, job_id)
    await reader.until("queued")
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc"))
    await reader.until_text("abc")
    await worker.turn(frame(job, 4, "d", finish="stop"))
    await reader.end()
    assert reader.text == "abcd"


async def test_a_cut_live_channel_is_opened_again_and_nothing_is_lost(bench: Bench, relay: Relay) -> None:
    job_id, worker = await bench.put(max_tokens=1000), await bench.worker()
    [job] = await worker.take()
    reader = Reader(relay, job_id)
    for offset in range(1, 200):
        if offset % 40 == 0:
            assert await bench.redis.client_kill_filter(_type="pubsub") >= 0
        await worker.turn(frame(job, offset, chr(97 + offset % 26)))
    await worker.turn(frame(job, 200, "!", finish="stop"))
    await reader.end()
    assert reader.text == "".join(chr(97 + offset % 26) for offset in range(1, 200)) + "!"


async def test_a_follower_that_lags_keeps_a_bounded_buffer_and_misses_nothing(bench: Bench, relay: Relay) -> None:
    count = 3 * MAX_KEPT_TOKENS
    job_id, worker = await bench.put(max_tokens=2 * count), await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "a"))
    with relay.follow(job_id) as slow:
        [first] = await slow.batch(HANG_S)
        assert isinstance(first, Tokens)
        assert first.texts == ["a"]
        witness = Reader(relay, job_id)
        for offset in range(2, count, 256):
            await worker.turn(frame(job, offset, "x" * 256))
        n = (await bench.queue.read(job_id, 2**40)).n
        await witness.until_text("a" + "x" * (n - 1))
        assert sum(len(entry.ids) for entry in slow._news) <= MAX_KEPT_TOKENS
        await worker.turn(frame(job, n + 1, "z", finish="stop"))
        rest: list[Told] = []
        while not slow.is_over:
            rest += one_by_one(await slow.batch(HANG_S))
    assert [told.event.offset for told in rest if told.event.event == "token"] == list(range(2, n + 2))
    assert rest[-1].event.event == "done"
    await witness.end()


async def test_a_follower_that_leaves_is_forgotten(bench: Bench, relay: Relay) -> None:
    job_id = await bench.put()
    reader = Reader(relay, job_id)
    await reader.until("queued")
    assert len(relay.followers) == 1
    await reader.leave()
    assert relay.followers == []
    assert relay._followers == {}


async def test_an_unknown_job_is_not_found(bench: Bench, relay: Relay) -> None:
    with relay.follow(bench.shard.new_id()) as follower, pytest.raises(JobNotFound):
        await follower.batch(HANG_S)
    assert relay.followers == []


async def test_a_job_that_redis_lost_ends_with_an_error(bench: Bench, deaf_relay: Relay) -> None:
    job_id = await bench.put()
    reader = Reader(deaf_relay, job_id)
    await reader.until("queued")
    await bench.redis.flushall()
    events = await reader.end()
    assert events[-1].event.event == "error"
    assert events[-1].event.error.code == "job_not_found"


async def test_a_log_that_lost_a_suffix_rewinds_its_reader_and_never_forks(bench: Bench, deaf_relay: Relay) -> None:
    """Redis failed over to a replica that lacked the last tokens, and another worker wrote others in their place."""
    job_id, worker = await bench.put(max_tokens=20), await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abcd"))
    await worker.turn(frame(job, 5, "efgh"))
    reader = Reader(deaf_relay, job_id)
    await reader.until_text("abcdefgh")
    async with bench.redis.pipeline() as failover:
        failover.delete(bench.shard.key(f"log:{job_id}"))
        ids = "[" + ",".join(str(ord(letter)) for letter in "abcd") + "]"
        failover.xadd(bench.shard.key(f"log:{job_id}"), {"ids": ids, "texts": '["a","b","c","d"]'}, id="4-0")
        failover.hset(bench.shard.key(f"job:{job_id}"), "n", 4)
        await failover.execute()
    await reader.until("rewind")
    assert reader.text == "abcd"
    await worker.turn(frame(job, 5, "EF", finish="stop"))
    await reader.end()
    assert reader.text == "abcdEF"


@pytest.fixture(params=["6.2", "7.0"])
def own_redis(request: pytest.FixtureRequest) -> Iterator[RedisProcess]:
    with RedisProcess(redis_binary(request.param), "--appendonly", "yes") as server:
        yield server


async def test_a_follower_holds_on_while_redis_is_away(own_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtral_server.follower, "LOOK_EVERY_S", 3600.0)  # the channel's return must be enough
    redis = connect(own_redis.url)
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits()}), redis)
    job_id, worker = await bench.put(), await bench.worker()
    async with Relay(redis, bench.queue) as relay:
        [job] = await worker.take()
        await worker.turn(frame(job, 1, "abc"))
        reader = Reader(relay, job_id)
        await reader.until_text("abc")
        own_redis.crash()
        with relay.follow(job_id) as follower, pytest.raises(RedisUnavailable):
            await follower.batch(HANG_S)
        own_redis.start()
        await worker.turn(frame(job, 1, "abcdef", finish="stop"))
        await reader.end()
    assert reader.text == "abcdef"
    assert reader.kinds == [*["token"] * 6, "done"]
    await redis.aclose()


async def test_a_look_that_redis_refused_is_made_again(bench: Bench, redis_process: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live channel stays open, but for a while there is no connection to read the log with."""
    monkeypatch.setattr(mixtral_server.follower, "LOOK_EVERY_S", 3600.0)
    redis = connect(redis_process.url)
    queue = JobQueue(redis, {ENDPOINT: QueueLimits()})
    job_id, worker = await bench.put(), await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc"))
    others = {client["id"] for client in await bench.redis.client_list()}
    async with Relay(redis, queue) as relay:
        await subscribed(relay)
        reader = Reader(relay, job_id)
        await reader.until_text("abc")
        clients = await bench.redis.client_list()
        [line] = [client["id"] for client in clients if client["cmd"] == "evalsha" and client["id"] not in others]
        await bench.redis.config_set("maxclients", len(clients) - 1)
        await bench.redis.client_kill_filter(_id=line)
        await bench.queue.cancel(job_id)
        for _ in range(3):
            with pytest.raises(RedisUnavailable):
                await queue.read(job_id)
        await bench.redis.config_set("maxclients", 10_000)
        await reader.end()
        assert reader.kinds[-1] == "done"
    await redis.aclose()


# ------------------------------------------------------------------------------------------------ a process's own turns


async def told(relay: Relay, worker: Hand, *frames: Frame) -> None:
    """A turn as a server makes it that listens."""
    worker.number += 1
    request = worker.request(*frames)
    relay.expect(request.frames)
    relay.tell((await worker.queue.turn(request, worker.key, asker="me")).news)


async def test_own_turns_reach_followers_by_their_answers_alone(bench: Bench, deaf_relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtral_server.follower, "LOOK_EVERY_S", 3600.0)
    job_id = await bench.put()
    worker = await bench.worker()
    [job] = await worker.take()
    reader = Reader(deaf_relay, job_id)
    await told(deaf_relay, worker, frame(job, 1, "ab"))
    await reader.until_text("ab")
    await told(deaf_relay, worker, frame(job, 2, "bcd"))  # a part of it is known: the log has the rest
    await reader.until_text("abcd")
    await told(deaf_relay, worker, frame(job, 5, "e", finish="stop", prompt_tokens=3, dropped_messages=1))
    await reader.end()
    assert reader.text == "abcde"
    assert reader.kinds[-1] == "done"


async def test_what_is_made_ready_goes_only_if_it_was_appended_and_the_reader_is_where_it_was(bench: Bench, deaf_relay: Relay) -> None:
    made: list[str] = []
    sent: list[str] = []

    def sink(tokens: Tokens) -> Callable[[], bool]:
        made.append("".join(tokens.texts))
        return lambda: sent.append("".join(tokens.texts)) is None

    job_id = await bench.put()
    worker = await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "a"))
    with deaf_relay.follow(job_id) as follower:
        follower.sink = sink
        while not await follower.batch(0.01):
            pass
        reading = asyncio.create_task(follower.batch(HANG_S))
        await asyncio.sleep(0)  # it waits

        await told(deaf_relay, worker, frame(job, 2, "b"))
        assert (made, sent) == (["b"], ["b"])
        deaf_relay.expect([frame(job, 3, "x")])  # what Redis refuses is told to nobody
        await told(deaf_relay, worker, frame(job, 3, "cd"))
        assert (made, sent) == (["b", "x", "cd"], ["b", "cd"])
        deaf_relay.expect([late := frame(job, 5, "e")])
        deaf_relay.tell([(job_id, Entry(5, late.ids, ("E",)))])  # another process's news of it came first
        deaf_relay.tell([(job_id, late)])
        assert (made[3:], sent[2:]) == (["e", "E"], ["E"])
        assert not reading.done()
        follower.stop()
        await reading


async def test_end_that_is_told_is_the_end_that_the_log_has(bench: Bench, deaf_relay: Relay) -> None:
    job_id = await bench.put()
    worker = await bench.worker()
    [job] = await worker.take()
    reader = Reader(deaf_relay, job_id)
    await told(deaf_relay, worker, frame(job, 1, "ab"))
    await reader.until_text("ab")
    await told(deaf_relay, worker, frame(job, 3, "c", finish="stop", prompt_tokens=3, dropped_messages=1))
    later = Reader(deaf_relay, job_id)
    assert (await reader.end())[-1] == (await later.end())[-1]


async def test_job_that_is_followed_before_it_is_put_needs_no_look(
    bench: Bench, deaf_relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixtral_server.follower, "LOOK_EVERY_S", 3600.0)
    job_id = bench.queue.new_id(ENDPOINT)
    with deaf_relay.follow(job_id, is_new=True, asks_place=False) as follower:
        assert await bench.put(job_ids=[job_id]) == job_id
        worker = await bench.worker()
        [job] = await worker.take()
        await told(deaf_relay, worker, frame(job, 1, "ab", finish="stop"))
        tokens, done = await follower.batch(HANG_S)
        assert isinstance(tokens, Tokens)
        assert (tokens.texts, follower.is_over) == (["a", "b"], True)
        assert not isinstance(done, Tokens)
        assert done.event.event == "done"


async def test_reader_that_began_without_a_look_is_told_nothing_twice_when_it_starts_over(bench: Bench, deaf_relay: Relay) -> None:
    job_id = bench.queue.new_id(ENDPOINT)
    with deaf_relay.follow(job_id, is_new=True, asks_place=False) as follower:
        await bench.put(job_ids=[job_id])
        worker = await bench.worker()
        [job] = await worker.take()
        await told(deaf_relay, worker, frame(job, 1, "ab"))
        first = await follower.batch(HANG_S)
        follower.look(start_over=True)
        await told(deaf_relay, worker, frame(job, 3, "c", finish="stop"))
        rest = await follower.batch(HANG_S)
    assert [told.event.event for told in one_by_one([*first, *rest])] == ["token", "token", "token", "done"]


async def test_turn_is_published_only_where_another_process_listens(bench: Bench) -> None:
    job_id = await bench.put()
    worker = await bench.worker()
    [job] = await worker.take()

    async def turn(offset: int, asker: str) -> None:
        worker.number += 1
        await worker.queue.turn(worker.request(frame(job, offset, "a")), worker.key, asker=asker)

    async with bench.redis.pubsub() as mine, bench.redis.pubsub() as another:
        await mine.subscribe(bench.shard.live)
        await mine.get_message(timeout=HANG_S)
        await turn(1, "me")
        await turn(2, "")  # it does not listen
        await another.subscribe(bench.shard.live)
        await another.get_message(timeout=HANG_S)
        await turn(3, "me")
        heard = [(await mine.get_message(timeout=HANG_S))["data"] for _ in range(2)]
    assert heard == [f'["",["{job_id}",2,[97],["a"]]]', f'["me",["{job_id}",3,[97],["a"]]]']


# ------------------------------------------------------------------------------------------------ parked turns


async def subscribed(relay: Relay) -> Relay:
    """Once the live channel is open: its opening counts as a wake."""
    async with asyncio.timeout(HANG_S):
        await relay.work(ENDPOINT, HANG_S, 0)
    return relay


async def idle_worker(bench: Bench) -> Hand:
    """One that has asked for work and found none."""
    worker = await bench.worker()
    assert await worker.take() == []
    return worker


async def test_a_new_job_wakes_every_parked_turn(bench: Bench, relay: Relay) -> None:
    await subscribed(relay)
    await idle_worker(bench)
    turns = [asyncio.create_task(relay.work(ENDPOINT, HANG_S)) for _ in range(3)]
    await asyncio.sleep(0)
    await bench.put()
    assert await asyncio.gather(*turns) == [True, True, True]


async def test_a_returned_job_wakes_parked_turns(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.put()
    await worker.take()
    async with Relay(bench.redis, bench.queue) as relay:
        await subscribed(relay)
        await idle_worker(bench)
        turn = asyncio.create_task(relay.work(ENDPOINT, HANG_S))
        await asyncio.sleep(0)
        await worker.close()
        assert await turn is True


async def test_a_job_between_a_turn_and_its_parking_is_noticed(bench: Bench, relay: Relay) -> None:
    seen = (await subscribed(relay)).wakes(ENDPOINT)
    await idle_worker(bench)
    other = asyncio.create_task(relay.work(ENDPOINT, HANG_S))
    await asyncio.sleep(0)
    await bench.put()
    await other
    assert await relay.work(ENDPOINT, HANG_S, seen) is True


async def test_a_turn_that_was_woken_in_vain_is_woken_by_the_next_job(bench: Bench, relay: Relay) -> None:
    seen = (await subscribed(relay)).wakes(ENDPOINT)
    quick, slow = [await idle_worker(bench) for _ in range(2)]
    await bench.put()
    assert await relay.work(ENDPOINT, HANG_S, seen) is True
    assert len(await quick.take()) == 1
    seen = relay.wakes(ENDPOINT)
    assert await slow.take() == []
    await bench.put()
    assert await relay.work(ENDPOINT, HANG_S, seen) is True


async def test_jobs_that_come_before_a_woken_turn_has_asked_wake_nobody_else(bench: Bench, relay: Relay) -> None:
    """The turn that is woken finds them all; and a worker that has work is not waited for."""
    seen = (await subscribed(relay)).wakes(ENDPOINT)
    idle = await idle_worker(bench)
    jobs = {await bench.put() for _ in range(3)}
    assert await relay.work(ENDPOINT, HANG_S, seen) is True
    assert {job.id for job in await idle.take(3)} == jobs
    seen = relay.wakes(ENDPOINT)
    assert (await idle.turn(room=3)).jobs == []  # it has work
    await bench.put()
    assert await relay.work(ENDPOINT, 0.05, seen) is False


async def test_a_turn_that_waits_for_its_batch_to_fill_is_woken_by_each_job(bench: Bench, relay: Relay) -> None:
    await subscribed(relay)
    worker = await bench.worker(static_batch=3)
    for _ in range(3):
        seen = relay.wakes(ENDPOINT)
        assert await worker.take(3) == []
        await bench.put()
        assert await relay.work(ENDPOINT, HANG_S, seen) is True
    assert len(await worker.take(3)) == 3


async def test_without_work_a_parked_turn_is_let_go_when_its_time_is_over(relay: Relay) -> None:
    await subscribed(relay)
    assert await relay.work(ENDPOINT, 0.01) is False
    assert await relay.work(ENDPOINT, 0.01, relay.wakes(ENDPOINT)) is False


# ------------------------------------------------------------------------------------------------ the cursor


def snapshot_of(log: list[Entry], after: int, attempt: int = 1) -> Snapshot:
    n = sum(len(entry.ids) for entry in log)
    entries = tuple(entry for entry in log if entry.offset + len(entry.ids) - 1 > after)
    return Snapshot("j", ENDPOINT, "ann", "", "streaming", 0, 0.0, attempt, n, entries)


def letters(first: int, text: str) -> Entry:
    return Entry(first, tuple(map(ord, text)), tuple(text))


def test_news_that_do_not_continue_what_was_sent_ask_to_start_over() -> None:
    cursor = Cursor()
    cursor.start_over(snapshot_of([letters(1, "abc")], 0))
    assert cursor.add(letters(5, "e")) is None
    assert cursor.add(letters(5, "ef")) is None
    assert cursor.add(letters(3, "xd")) is None
    assert cursor.catch_up(snapshot_of([letters(1, "ab"), letters(3, "xyz")], cursor.offset)) is None
    assert cursor.catch_up(snapshot_of([letters(1, "ab")], cursor.offset)) is None
    assert cursor.add(letters(1, "ab")) == Tokens(4, (), (), [])
    assert cursor.add(letters(3, "cd")) == Tokens(4, (ord("d"),), ("d",), [ids_crc(map(ord, "abcd"))])


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 3), min_size=1, max_size=4), st.booleans()),
        st.tuples(st.just("repeat"), st.integers(0, 100), st.just(True)),
        st.tuples(st.just("look"), st.booleans(), st.just(True)),
        st.tuples(st.just("lose suffix"), st.integers(0, 12), st.just(True)),
    ),
    max_size=40,
)


@given(steps, st.integers(0, 6))
def test_whatever_is_lost_or_repeated_the_reader_ends_with_the_log(plan: list[tuple[str, object, bool]], after: int) -> None:
    """Messages lost or told again, looks at any moment, logs that lose a suffix and grow another: each event is right when it comes."""
    log: list[Entry] = []
    cursor = Cursor(after, ids_crc([1] * after))
    sent = [1] * after  # what a resuming client holds

    def deliver(events: Sequence[Followed] | None) -> bool:
        for followed in one_by_one(events or ()):
            if followed.event.event == "rewind":
                del sent[followed.event.to :]
            if followed.event.event == "token":
                sent.extend(followed.ids)
                assert followed.event.offset == len(sent)
                assert sent == [token for entry in log for token in entry.ids][: len(sent)]
            assert followed.id == event_id(len(sent), ids_crc(sent))
        return events is not None

    def hear(entry: Entry) -> bool:
        tokens = cursor.add(entry)
        return tokens is not None and deliver([tokens])

    def look(*, start_over: bool) -> None:
        if start_over or not deliver(cursor.catch_up(snapshot_of(log, cursor.offset))):
            deliver(cursor.start_over(snapshot_of(log, 0)))

    look(start_over=True)
    for kind, what, is_heard in plan:
        if kind == "append":
            assert isinstance(what, list)
            entry = Entry(1 + sum(len(entry.ids) for entry in log), tuple(what), tuple(map(str, what)))
            log.append(entry)
            if is_heard and not hear(entry):
                look(start_over=False)
        elif kind == "repeat" and log:
            assert isinstance(what, int)
            if not hear(log[what % len(log)]):
                look(start_over=False)
        elif kind == "look":
            look(start_over=bool(what))
        elif kind == "lose suffix":
            assert isinstance(what, int)
            del log[len(log) - min(what, len(log)) :]
            look(start_over=True)  # a lost suffix comes with a lost connection
    look(start_over=False)
    assert sent == [token for entry in log for token in entry.ids]


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.lists(st.integers(1, 2), min_size=16, max_size=16))
def test_each_return_to_the_queue_is_told_once(sees_waiting: list[bool], looks: list[int]) -> None:
    cursor, told = Cursor(), []
    cursor.start_over(snapshot_of([], 0, 1))
    for attempt, sees in enumerate(sees_waiting, 1):
        waiting, leased = replace(snapshot_of([], 0, attempt), state="waiting"), snapshot_of([], 0, attempt + 1)
        for snapshot in [waiting] * (looks[attempt] * sees) + [leased] * looks[attempt + 1]:
            told += cursor.catch_up(snapshot) or []
    assert [followed.event.event for followed in told] == ["moved"] * len(sees_waiting)
    assert [followed.event.attempt for followed in told] == list(range(2, len(told) + 2))  # type: ignore[union-attr]
