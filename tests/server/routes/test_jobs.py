"""The native job routes: put, look, follow and resume, cancel; and that a job is its owner's alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from mixtral_client.protocol import FrameError, JobAccepted, JobView, ids_crc
from mixtral_client.sse import SseDecoder
from support.http import state_of, until
from support.live_server import LiveServer
from support.scripted_worker import ScriptedWorker, answer_to, token

CHAT = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]}


async def put(http: aiohttp.ClientSession, **more: Any) -> str:
    async with http.post("/v1/jobs", json=CHAT | more) as answer:
        assert answer.status == 202, await answer.text()
        return JobAccepted.model_validate(await answer.json()).id


async def events(http: aiohttp.ClientSession, path: str, **headers: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, id, fields) of every event until the stream ends."""
    async with http.get(path, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        read = SseDecoder().feed(await answer.read())
    return [(one.event, one.id, json.loads(one.data)) for one in read]


async def test_put_answers_202_with_place_in_queue_and_where_to_look(http: aiohttp.ClientSession) -> None:
    await put(http)
    async with http.post("/v1/jobs", json=CHAT) as answer:
        assert answer.status == 202
        job = JobAccepted.model_validate(await answer.json())
        assert answer.headers["Location"] == f"/v1/jobs/{job.id}"
    assert (job.state, job.position, job.model) == ("waiting", 2, "mixtral_chat")


async def test_job_shows_its_whole_life(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await put(http)
    waiting = JobView.model_validate(await state_of(http, job_id, "waiting"))
    assert (waiting.position, waiting.attempt, waiting.text, waiting.finish) == (1, 0, "", None)
    async with ScriptedWorker(server.url, server.worker_key, pause_after=4) as worker:
        await state_of(http, job_id, "streaming")
        await until(lambda: bool(worker.seen))
        worker.go.set()
        done = JobView.model_validate(await state_of(http, job_id, "done"))
    assert (done.position, done.attempt, done.tokens, done.text, done.finish) == (None, 1, 10, answer_to("hello"), "stop")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, 10)
    assert done.timings is not None
    assert done.timings.total_s is not None
    assert done.timings.first_token_s is not None
    assert 0 <= done.timings.first_token_s <= done.timings.total_s


async def test_events_are_queued_then_every_token_with_its_id_then_done(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await put(http)
    following = asyncio.create_task(events(http, f"/v1/jobs/{job_id}/events"))
    async with http.get(f"/v1/jobs/{job_id}/events") as answer:
        await answer.content.readuntil(b"\n\n")  # retry
        assert b"event: queued" in await answer.content.readuntil(b"\n\n")
    async with ScriptedWorker(server.url, server.worker_key):
        seen = await following
    tokens = [one for one in seen if one[0] == "token"]
    crc = 0
    for offset, (_, event_id, fields) in enumerate(tokens, 1):
        number, text = token("user: hello", offset)
        crc = ids_crc([number], crc)
        assert (event_id, fields) == (f"{offset}.{crc:08x}", {"offset": offset, "text": text})
    assert len(tokens) == 10
    assert [name for name, _, _ in seen if name in ("done", "error")] == ["done"]
    assert seen[-1][2]["finish"] == "stop"


async def test_first_line_says_how_long_to_wait_before_a_reconnect(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    async with http.get(f"/v1/jobs/{await put(http)}/events") as answer:
        assert (await answer.content.readline()) == b"retry: 1000\n"


@pytest.mark.parametrize("resume", ["header", "query"])
async def test_resume_goes_on_exactly_after_the_event_named(http: aiohttp.ClientSession, worker: ScriptedWorker, resume: str) -> None:
    job_id = await put(http)
    whole = await events(http, f"/v1/jobs/{job_id}/events")
    tokens = [one for one in whole if one[0] == "token"]
    for offset, (_, event_id, _) in enumerate(tokens, 1):
        if resume == "header":
            rest = await events(http, f"/v1/jobs/{job_id}/events", **{"Last-Event-ID": event_id})
        else:
            rest = await events(http, f"/v1/jobs/{job_id}/events?after={event_id}")
        assert [one[2] for one in rest if one[0] == "token"] == [one[2] for one in tokens[offset:]]
        assert rest[-1][0] == "done"


async def test_resume_beside_the_log_is_rewound_not_forked(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    job_id = await put(http)
    await events(http, f"/v1/jobs/{job_id}/events")
    read = await events(http, f"/v1/jobs/{job_id}/events", **{"Last-Event-ID": "4.deadbeef"})
    assert read[0][0] == "rewind"
    assert "".join(fields["text"] for name, _, fields in read if name == "token") == answer_to("hello")


@pytest.mark.parametrize("given", ["x", "1.zz", "-1.00000000", "1e3"])
async def test_unreadable_resume_point_is_refused(http: aiohttp.ClientSession, given: str) -> None:
    job_id = await put(http)
    async with http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": given}) as answer:
        assert answer.status == 400
        assert "Last-Event-ID" in (await answer.json())["error"]["message"]


async def test_reader_that_leaves_leaves_the_job_running(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await put(http)
    async with ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker:
        async with http.get(f"/v1/jobs/{job_id}/events") as answer:
            await answer.content.readuntil(b"event: token")
            answer.close()
        worker.go.set()
        assert (await state_of(http, job_id, "done", "cancelled"))["state"] == "done"


async def test_cancel_of_a_waiting_job_ends_it_at_once(http: aiohttp.ClientSession) -> None:
    job_id = await put(http)
    async with http.delete(f"/v1/jobs/{job_id}") as answer:
        assert answer.status == 200
        assert (await answer.json())["state"] == "cancelled"
    assert [name for name, _, _ in await events(http, f"/v1/jobs/{job_id}/events")] == ["done"]


async def test_cancel_of_a_running_job_keeps_its_text_and_is_told_to_the_worker(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await put(http)
    async with ScriptedWorker(server.url, server.worker_key, pause_after=3) as worker:
        following = asyncio.create_task(events(http, f"/v1/jobs/{job_id}/events"))
        await state_of(http, job_id, "streaming")
        async with http.delete(f"/v1/jobs/{job_id}") as answer:
            job = await answer.json()
        assert (job["state"], job["finish"], job["text"]) == ("cancelled", "cancelled", answer_to("hello", 3))
        assert (await following)[-1][2]["finish"] == "cancelled"
        await until(lambda: worker.dropped == [job_id])


async def test_cancel_of_a_finished_job_changes_nothing(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    job_id = await put(http)
    await state_of(http, job_id, "done")
    async with http.delete(f"/v1/jobs/{job_id}") as answer:
        assert (await answer.json())["state"] == "done"


async def test_failed_job_ends_in_an_error_event_with_the_workers_words(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await put(http)
    async with ScriptedWorker(server.url, server.worker_key, fail=FrameError(code="context_length_exceeded", message="too long")):
        read = await events(http, f"/v1/jobs/{job_id}/events")
        job = JobView.model_validate(await state_of(http, job_id, "failed"))
    assert read[-1][0] == "error"
    assert read[-1][2]["error"]["message"] == "too long"
    assert job.error is not None
    assert job.error.code == "context_length_exceeded"


async def test_job_goes_on_at_another_worker_without_a_gap(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await put(http)
    following = asyncio.create_task(events(http, f"/v1/jobs/{job_id}/events"))
    async with ScriptedWorker(server.url, server.worker_key, pause_after=4):
        await state_of(http, job_id, "streaming")
    async with ScriptedWorker(server.url, server.worker_key) as second:
        read = await following
    assert "".join(fields["text"] for name, _, fields in read if name == "token") == answer_to("hello")
    assert [fields["offset"] for name, _, fields in read if name == "token"] == list(range(1, 11))
    assert [len(job.produced_ids) for job in second.seen] == [4]


async def test_job_that_no_worker_began_in_time_expires(http: aiohttp.ClientSession) -> None:
    job_id = await put(http, queue_timeout_s=0.05)
    assert (await state_of(http, job_id, "expired"))["finish"] == "expired"


async def test_prompt_job_and_priority_reach_the_queue(http: aiohttp.ClientSession, server: LiveServer) -> None:
    async def prompt(text: str, priority: int) -> str:
        body = {"model": "mixtral_chat", "prompt": text, "priority": priority}
        async with http.post("/v1/jobs", json=body) as answer:
            return str((await answer.json())["id"])

    later, first = await prompt("later", 5), await prompt("first", 0)
    async with ScriptedWorker(server.url, server.worker_key, slots=1) as worker:
        await state_of(http, later, "done")
        await state_of(http, first, "done")
    assert [job.spec.prompt for job in worker.seen] == ["first", "later"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "mixtral_chat"}, "give exactly one of 'messages' (a chat) and 'prompt'"),
        (CHAT | {"prompt": "x"}, "give exactly one of 'messages' (a chat) and 'prompt'"),
        (CHAT | {"priority": 10}, "priority must be less than or equal to 9; got 10"),
        (CHAT | {"queue_timeout_s": 0}, "queue_timeout_s must be greater than 0; got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_wrong_job_is_refused_with_field_rule_and_what_was_given(
    http: aiohttp.ClientSession, body: dict[str, Any], words: str
) -> None:
    async with http.post("/v1/jobs", json=body) as answer:
        assert answer.status == 400
        assert words in (await answer.json())["error"]["message"]


async def test_repeat_with_same_key_is_answered_200_with_the_same_job(http: aiohttp.ClientSession) -> None:
    async def send() -> tuple[int, str]:
        async with http.post("/v1/jobs", json=CHAT, headers={"Idempotency-Key": "k"}) as answer:
            return answer.status, (await answer.json())["id"]

    first, *others = sorted(await asyncio.gather(*(send() for _ in range(5))), reverse=True)
    assert first[0] == 202
    assert others == [(200, first[1])] * 4


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_idempotency_key_of_wrong_length_is_refused(http: aiohttp.ClientSession, key: str) -> None:
    async with http.post("/v1/jobs", json=CHAT, headers={"Idempotency-Key": key}) as answer:
        assert answer.status == 400
        assert "1 to 255 printable ASCII characters" in (await answer.json())["error"]["message"]


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "/events"), ("DELETE", "")])
async def test_job_of_another_user_looks_like_one_that_is_not(
    server: LiveServer, http: aiohttp.ClientSession, method: str, path: str
) -> None:
    job_id = await put(http)
    other = {"Authorization": f"Bearer {await server.new_key('client')}"}
    answers = []
    for one in (job_id, "mixtral_chat.0-" + "0" * 32, "nonsense"):
        async with http.request(method, f"/v1/jobs/{one}{path}", headers=other) as answer:
            error = (await answer.json())["error"]
            answers.append((answer.status, error["code"], error["message"].replace(one, "")))
    assert answers == [answers[0]] * 3
    assert answers[0][:2] == (404, "job_not_found")
    assert (await state_of(http, job_id, "waiting"))["state"] == "waiting"
