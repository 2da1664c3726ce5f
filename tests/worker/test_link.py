"""The link against a real HTTP server: what goes out, what is sent again, what is given up. The tests play the step loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from mixtral_client.protocol import PROTOCOL_VERSION, FrameError, SessionRequest
from mixtral_worker import link as link_module
from mixtral_worker.link import DrainAsked, Event, JobDropped, JobTaken, Link, LinkEnded, LinkRefused, Piece
from support.fake_server import ENDPOINT, KEY, FakeServer, Job, serving

E = TypeVar("E", bound=Event)
CHAT = [("user", "Hello")]


def login(**changes: Any) -> SessionRequest:
    fields = {
        "endpoint": ENDPOINT,
        "name": "box",
        "protocol": PROTOCOL_VERSION,
        "version": "1",
        "model": "tiny",
        "device": "cpu",
        "max_slots": 4,
        "max_seq_len": 64,
    }
    return SessionRequest(**{**fields, **changes})


class StepLoop:
    """Stands where the step loop stands: polls and beats."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.seen: list[Event] = []

    async def next(self, kind: type[E]) -> E:
        """The next event of a kind; other kinds on the way are kept in `seen`."""
        async with asyncio.timeout(60):
            while True:
                self.link.beat()
                for event in await asyncio.to_thread(self.link.poll, 0.05):
                    self.seen.append(event)
                for index, event in enumerate(self.seen):
                    if isinstance(event, kind):
                        del self.seen[index]
                        return event

    async def beat_until(self, task: asyncio.Future[Any]) -> None:
        async with asyncio.timeout(60):
            while not task.done():
                self.link.beat()
                self.seen += await asyncio.to_thread(self.link.poll, 0.05)
            await task


@asynccontextmanager
async def linked(server: FakeServer, key: str = KEY, max_unsent_tokens: int = 1000, **changes: Any) -> AsyncIterator[StepLoop]:
    link = Link(server.url, key, login(**changes), max_unsent_tokens)
    link.start()
    try:
        yield StepLoop(link)
    finally:
        await asyncio.to_thread(link.close, 5.0)


def tokens(job: Job, first: int, count: int, end: Any = None) -> list[Piece]:
    """Pieces for offsets first … first + count - 1; token n has id 1000 + n and text "n,"."""
    numbers = range(first, first + count)
    return [
        Piece(job.id, job.attempt, 7, 1000 + number, f"{number},", end if number == numbers[-1] else None) for number in numbers
    ]  # fmt: skip


def ids(count: int) -> list[int]:
    return [1001 + index for index in range(count)]


async def test_login_names_endpoint_slots_and_protocol_and_an_idle_worker_gets_a_job_as_soon_as_it_is_queued() -> None:
    async with serving() as server, linked(server) as loop:
        await server.until(lambda: bool(server.turns))
        job = await server.put(messages=CHAT, max_tokens=5)
        taken = (await loop.next(JobTaken)).job
        assert server.logins == [login()]
        assert (taken.id, taken.attempt, taken.spec.max_tokens) == (job.id, 1, 5)
        assert len(server.turns) == 1, "the parked turn itself brought the job"


async def test_tokens_reach_the_log_once_in_order_with_prompt_tokens_in_the_first_and_the_last_frame() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        for number in range(1, 10):
            loop.link.report(tokens(job, number, 1, "stop" if number == 9 else None))
            await server.until(lambda n=number: len(job.ids) >= n)  # type: ignore[misc]
        await server.finished(job)
        assert job.ids == ids(9)
        assert job.text == "1,2,3,4,5,6,7,8,9,"
        assert job.finish == "stop"
        assert job.prompt_tokens == [7, 7]


async def test_a_jobs_first_token_goes_out_without_waiting_for_the_report_interval() -> None:
    async with serving(lease_s=3000, report_interval_ms=900_000) as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        loop.link.report(tokens(job, 1, 1))
        await server.until(lambda: job.ids == ids(1))


async def test_a_lost_answer_is_asked_for_again_with_the_same_number_and_body_and_no_token_doubles() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        before = len(server.turns)
        server.answers_to_lose = 3
        loop.link.report(tokens(job, 1, 4))
        loop.link.report(tokens(job, 5, 2, "length"))
        await server.until(lambda: not server.answers_to_lose and len(server.turns) > before + 3)
        await server.finished(job)
        assert job.ids == ids(6)
        assert server.turns[before] == server.turns[before + 1] == server.turns[before + 2] == server.turns[before + 3]


async def test_a_job_in_a_lost_answer_is_taken_once() -> None:
    async with serving() as server:
        server.answers_to_lose = 1
        job = await server.put(messages=CHAT)
        async with linked(server) as loop:
            assert (await loop.next(JobTaken)).job.id == job.id
            loop.link.report(tokens(job, 1, 3, "stop"))
            await server.finished(job)
            assert job.attempt == 1
            assert not [event for event in loop.seen if isinstance(event, JobTaken)]


async def test_busy_server_is_asked_again_until_it_answers() -> None:
    async with serving() as server:
        server.answers_to_refuse = [503, 429, 500, 502]
        job = await server.put(messages=CHAT)
        async with linked(server) as loop:
            await loop.next(JobTaken)
            server.answers_to_refuse = [503, 503]
            loop.link.report(tokens(job, 1, 2, "stop"))
            await server.finished(job)
            assert job.ids == ids(2)


async def test_no_pause_outlasts_the_lease_however_long_the_server_asks_for() -> None:
    async with serving(lease_s=4.0) as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        server.answers_to_refuse, server.retry_after_s = [503, 503], 8
        loop.link.report(tokens(job, 1, 2, "stop"))
        await loop.beat_until(asyncio.ensure_future(server.finished(job)))
        assert (job.ids, job.attempt, len(server.logins)) == (ids(2), 1, 1)


async def test_a_lapsed_session_drops_the_batch_and_the_job_comes_back_under_a_new_session() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        loop.link.report(tokens(job, 1, 3))
        await server.until(lambda: len(job.ids) == 3)
        await server.lapse()
        loop.link.report(tokens(job, 4, 2))
        assert await loop.next(JobDropped) == JobDropped(job.id, 1)
        again = (await loop.next(JobTaken)).job
        assert (again.attempt, again.produced_ids, again.sent_bytes) == (2, ids(3), len("1,2,3,"))
        assert len(server.logins) == 2
        loop.link.report([Piece(job.id, 1, 7, 9999, "late")])  # the old attempt's step was still running
        loop.link.report(tokens(job, 4, 2, "stop"))
        await server.finished(job)
        assert job.ids == ids(5)


async def test_tokens_made_while_the_server_is_away_arrive_in_order_afterwards() -> None:
    async with serving() as server, linked(server) as loop:
        jobs = [await server.put(messages=CHAT) for _ in range(3)]
        for _ in jobs:
            await loop.next(JobTaken)
        for job in jobs:
            loop.link.report(tokens(job, 1, 1))
        await server.until(lambda: all(job.ids for job in jobs))
        await server.stop()
        for number in range(2, 40):
            for job in jobs:
                loop.link.report(tokens(job, number, 1, "length" if number == 39 else None))
        await server.start()
        await server.finished(*jobs)
        assert [job.ids for job in jobs] == [ids(39)] * 3
        assert len(server.logins) == 1, "an outage costs no session"


async def test_the_step_loop_is_told_to_pause_when_the_buffer_is_full_and_to_go_on_when_it_is_sent() -> None:
    async with serving() as server, linked(server, max_unsent_tokens=50) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        await server.stop()
        loop.link.report(tokens(job, 1, 49))
        assert not loop.link.is_full
        loop.link.report(tokens(job, 50, 1))
        assert loop.link.is_full
        await server.start()
        await server.until(lambda: len(job.ids) == 50)
        loop.link.report(tokens(job, 51, 1, "stop"))
        await server.finished(job)
        assert job.ids == ids(51)
        assert not loop.link.is_full


async def test_many_unsent_tokens_go_out_in_turns_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_TURN_TOKENS", 10)
    async with serving() as server, linked(server) as loop:
        jobs = [await server.put(messages=CHAT) for _ in range(2)]
        for _ in jobs:
            await loop.next(JobTaken)
        loop.link.report([*tokens(jobs[0], 1, 24, "stop"), *tokens(jobs[1], 1, 7, "stop")])
        await server.finished(*jobs)
        assert [job.ids for job in jobs] == [ids(24), ids(7)]
        assert max(sum(len(frame.ids) for frame in turn.frames) for turn in server.turns) <= 10


async def test_a_log_that_lost_its_end_gets_it_again_from_the_offset_it_expects() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        loop.link.report(tokens(job, 1, 8))
        await server.until(lambda: len(job.ids) == 8)
        server.forget_log_after(job, 3)
        loop.link.report(tokens(job, 9, 2, "stop"))
        await server.finished(job)
        assert job.ids == ids(10)


async def test_a_job_whose_log_lost_tokens_of_an_earlier_holder_is_handed_back() -> None:
    async with serving() as server:
        job = await server.put(messages=CHAT, ids=ids(5), texts=["1,", "2,", "3,", "4,", "5,"])
        async with linked(server) as loop:
            assert (await loop.next(JobTaken)).job.produced_ids == ids(5)
            server.forget_log_after(job, 2)
            loop.link.report(tokens(job, 6, 1))
            assert await loop.next(JobDropped) == JobDropped(job.id, 1)
            again = (await loop.next(JobTaken)).job
            assert (again.attempt, again.produced_ids) == (2, ids(2))


async def test_a_cancelled_job_is_dropped_and_its_later_tokens_are_forgotten() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        loop.link.report(tokens(job, 1, 2))
        await server.until(lambda: len(job.ids) == 2)
        await server.cancel(job)
        loop.link.report(tokens(job, 3, 1))
        assert await loop.next(JobDropped) == JobDropped(job.id, 1)
        loop.link.report(tokens(job, 4, 1, "stop"))
        other = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        loop.link.report(tokens(other, 1, 1, "stop"))
        await server.finished(other)
        assert job.ids == ids(2)


async def test_a_cancelled_job_is_dropped_though_nothing_is_reported_of_it() -> None:
    async with serving(lease_s=0.9) as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        await server.cancel(job)
        assert await loop.next(JobDropped) == JobDropped(job.id, 1)


async def test_room_is_what_the_batch_has_free() -> None:
    async with serving() as server, linked(server, max_slots=2) as loop:
        jobs = [await server.put(messages=CHAT) for _ in range(3)]
        assert [(await loop.next(JobTaken)).job.id for _ in range(2)] == [jobs[0].id, jobs[1].id]
        loop.link.report(tokens(jobs[0], 1, 1))
        await server.until(lambda: bool(jobs[0].ids))
        assert server.turns[-1].room == 0
        assert jobs[2].attempt == 0
        loop.link.report(tokens(jobs[0], 2, 1, "stop"))
        assert (await loop.next(JobTaken)).job.id == jobs[2].id


async def test_holding_names_finished_jobs_until_their_end_is_acknowledged() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        server.answers_to_lose = 1
        loop.link.report(tokens(job, 1, 1, "stop"))
        await server.finished(job)
        last = server.turns[-1]
        assert last.frames[0].finish == "stop"
        assert last.holding == [(job.id, 1)]
        other = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        loop.link.report(tokens(other, 1, 1, "stop"))
        await server.finished(other)
        assert server.turns[-1].holding == [(other.id, 1)]


async def test_a_hung_step_loop_loses_its_session_and_takes_its_job_anew_when_it_moves_again() -> None:
    async with serving(lease_s=1.0) as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        await until_lapsed(server)  # no beat meanwhile
        loop.link.beat()
        assert await loop.next(JobDropped) == JobDropped(job.id, 1)
        assert (await loop.next(JobTaken)).job.attempt == 2


async def until_lapsed(server: FakeServer) -> None:
    """Until the only session has had no turn for a whole lease."""
    (session,) = server.sessions.values()
    async with asyncio.timeout(60):
        while (left_s := session.ends_s - time.monotonic()) > 0:
            await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=left_s)


async def test_a_moving_step_loop_keeps_its_lease_though_it_reports_nothing() -> None:
    async with serving(lease_s=0.6) as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        several_leases = asyncio.ensure_future(server.until(lambda: len(server.turns) > 15))
        await loop.beat_until(several_leases)
        assert len(server.logins) == 1
        loop.link.report(tokens(job, 1, 1, "stop"))
        await loop.beat_until(asyncio.ensure_future(server.finished(job)))
        assert job.attempt == 1


@pytest.mark.parametrize(
    ("key", "changes", "word"),
    [
        ("wrong", {}, "keys.env"),
        (KEY, {"endpoint": "elsewhere"}, "no endpoint elsewhere"),
        (KEY, {"protocol": PROTOCOL_VERSION - 1}, f"needs {PROTOCOL_VERSION}"),
    ],
)
async def test_a_worker_that_cannot_be_let_in_ends_with_one_sentence(key: str, changes: dict[str, Any], word: str) -> None:
    async with serving() as server, linked(server, key=key, **changes) as loop:
        ended = await loop.next(LinkEnded)
        assert isinstance(ended.error, LinkRefused)
        assert word in str(ended.error)
        assert "\n" not in str(ended.error)
        assert server.logins == []


async def test_a_revoked_key_ends_the_worker() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        server.answers_to_refuse = [403]
        loop.link.report(tokens(job, 1, 1))
        assert isinstance((await loop.next(LinkEnded)).error, LinkRefused)


async def test_a_turn_the_server_cannot_read_costs_the_session_not_the_worker() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        server.answers_to_refuse = [400]
        loop.link.report(tokens(job, 1, 1))
        assert await loop.next(JobDropped) == JobDropped(job.id, 1)
        await server.until(lambda: len(server.logins) == 2)
        await server.lapse()
        assert (await loop.next(JobTaken)).job.attempt == 2


async def test_a_job_this_version_cannot_read_fails_alone_and_says_which_field() -> None:
    async with serving() as server:
        strange = await server.put(messages=CHAT)
        plain = await server.put(messages=CHAT)

        def spoil(raw: dict[str, Any]) -> None:
            if raw["id"] == strange.id:
                raw["spec"]["messages"][0]["role"] = "oracle"

        server.spoil_job = spoil
        async with linked(server) as loop:
            assert (await loop.next(JobTaken)).job.id == plain.id
            await server.until(lambda: strange.is_over)
            assert isinstance(strange.error, FrameError)
            assert strange.error.code == "unreadable_job"
            assert "spec.messages.0.role" in strange.error.message
            assert "oracle" in strange.error.message
            assert not plain.is_over


async def test_closing_sends_what_is_left_and_hands_running_jobs_back_at_once() -> None:
    async with serving(lease_s=3000, report_interval_ms=900_000) as server:
        async with linked(server) as loop:
            done, running = await server.put(messages=CHAT), await server.put(messages=CHAT)
            await loop.next(JobTaken)
            await loop.next(JobTaken)
            loop.link.report([*tokens(done, 1, 1), *tokens(running, 1, 1)])
            await server.until(lambda: bool(done.ids and running.ids))
            loop.link.report([*tokens(running, 2, 5), *tokens(done, 2, 1, "stop")])
        assert server.logouts == ["session-1"]
        assert (done.finish, running.finish) == ("stop", None)
        assert running.ids == ids(6)
        assert server.waiting == [running]


async def test_closing_an_idle_worker_does_not_wait_for_its_parked_turn() -> None:
    async with serving() as server:
        async with linked(server):
            await server.until(lambda: bool(server.turns))
        assert server.logouts == ["session-1"]


async def test_closing_gives_up_on_a_server_that_is_away() -> None:
    async with serving() as server:
        async with linked(server) as loop:
            job = await server.put(messages=CHAT)
            await loop.next(JobTaken)
            await server.stop()
            loop.link.report(tokens(job, 1, 1))
            await asyncio.to_thread(loop.link.close, 0.5)
        assert job.ids == []


async def test_a_draining_worker_claims_nothing_and_finishes_what_it_has() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        loop.link.drain()
        loop.link.report(tokens(job, 1, 1))
        await server.until(lambda: bool(job.ids))
        late = await server.put(messages=CHAT)
        loop.link.report(tokens(job, 2, 1, "stop"))
        await server.finished(job)
        assert server.turns[-1].room == 0
        assert late.attempt == 0


async def test_a_server_that_asks_to_drain_is_heard_once() -> None:
    async with serving() as server, linked(server) as loop:
        job = await server.put(messages=CHAT)
        await loop.next(JobTaken)
        server.drain = True
        for number in range(1, 5):
            loop.link.report(tokens(job, number, 1))
            await server.until(lambda n=number: len(job.ids) == n)  # type: ignore[misc]
        await loop.next(DrainAsked)
        loop.link.report(tokens(job, 5, 1, "stop"))
        await server.finished(job)
        assert not [event for event in loop.seen if isinstance(event, DrainAsked)]
