"""The worker wire over HTTP: log in, turn, log out, and who may."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mixtral_client.protocol import PROTOCOL_VERSION, TurnAnswer
from mixtral_server.endpoints import EndpointConfig
from support.http import state_of
from support.live_server import LiveServer

LOGIN: dict[str, Any] = {
    "endpoint": "mixtral_chat",
    "name": "box",
    "protocol": PROTOCOL_VERSION,
    "version": "1",
    "model": "m",
    "device": "cpu",
    "max_slots": 4,
    "max_seq_len": 4096,
}
CHAT = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def as_worker(server: LiveServer) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.worker_key}"}


async def login(http: aiohttp.ClientSession, headers: dict[str, str], **more: Any) -> str:
    async with http.post("/v1/worker/sessions", json=LOGIN | more, headers=headers) as answer:
        assert answer.status == 201, await answer.text()
        body = await answer.json()
    assert (body["lease_s"], body["report_interval_ms"]) == (10.0, 20)
    return str(body["session"])


async def turn(http: aiohttp.ClientSession, headers: dict[str, str], **body: Any) -> TurnAnswer:
    async with http.post("/v1/worker/turn", json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return TurnAnswer.model_validate(await answer.json())


async def test_idle_turn_waits_and_gets_the_job_when_it_comes(http: aiohttp.ClientSession, as_worker: dict[str, str]) -> None:
    session = await login(http, as_worker)
    waiting = asyncio.create_task(turn(http, as_worker, session=session, turn=1, room=4))
    async with http.get("/readyz?workers=1") as ready:  # the turn is on its way once this was answered
        assert ready.status == 200
    assert not waiting.done()
    async with http.post("/v1/jobs", json=CHAT) as answer:
        job_id = (await answer.json())["id"]
    assert [job.id for job in (await waiting).jobs] == [job_id]


async def test_idle_turn_without_work_is_answered_empty_after_worker_poll_s(empty_redis: str, tmp_path: Any) -> None:
    with LiveServer(tmp_path, empty_redis, worker_poll_s=0.1, worker_claim_s=0.05) as server:
        headers = {"Authorization": f"Bearer {server.worker_key}"}
        async with server.http() as http:
            session = await login(http, headers)
            began = time.monotonic()
            answer = await turn(http, headers, session=session, turn=1, room=4)
    assert time.monotonic() - began >= 0.1
    assert (answer.jobs, answer.drops, answer.drain) == ([], [], False)


async def test_parked_turns_of_two_replicas_leave_jobs_alone_until_a_batch_is_full(empty_redis: str, tmp_path: Path) -> None:
    """Two workers that take whole batches wait at a server each: the job that fills a batch sends all of it to one of them."""
    endpoint = EndpointConfig(name="mixtral_chat", batch_wait_ms=60_000)
    async with AsyncExitStack() as stack:
        replicas = [await parked(stack, made(tmp_path / name), empty_redis, endpoint) for name in ("a", "b")]
        first = replicas[0][0]
        jobs = [await put(first) for _ in range(3)]
        assert not any(waiting.done() for _, _, waiting in replicas)
        jobs.append(await put(first))
        done, still = await asyncio.wait([waiting for _, _, waiting in replicas], return_when=asyncio.FIRST_COMPLETED)
        assert [[job.id for job in one.result().jobs] for one in done] == [jobs]
        for one in still:
            one.cancel()


async def test_a_batch_that_stays_small_goes_when_its_linger_ends_and_not_when_the_turn_would_ask_anyway(
    empty_redis: str, tmp_path: Path
) -> None:
    endpoint = EndpointConfig(name="mixtral_chat", batch_wait_ms=500)
    async with AsyncExitStack() as stack:
        http, _, waiting = await parked(stack, tmp_path, empty_redis, endpoint)
        job = await put(http)
        async with asyncio.timeout(3 * 0.5 + 2):  # less than the 5 s after which it claims anew
            assert [one.id for one in (await waiting).jobs] == [job]


async def parked(
    stack: AsyncExitStack, folder: Path, redis_url: str, endpoint: EndpointConfig
) -> tuple[aiohttp.ClientSession, dict[str, str], asyncio.Task[TurnAnswer]]:
    """A server of its own with one worker that takes batches of 4, whose turn waits there."""
    server = stack.enter_context(LiveServer(folder, redis_url, endpoint))
    headers = {"Authorization": f"Bearer {server.worker_key}"}
    http = await stack.enter_async_context(server.http())
    session = await login(http, headers, static_batch=4)
    waiting = asyncio.create_task(turn(http, headers, session=session, turn=1, room=4))
    async with http.get("/readyz?workers=1") as ready:  # the turn is on its way once this was answered
        assert ready.status == 200
    return http, headers, waiting


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


async def put(http: aiohttp.ClientSession) -> str:
    async with http.post("/v1/jobs", json=CHAT) as answer:
        assert answer.status == 202, await answer.text()
        return str((await answer.json())["id"])


async def test_waiting_turn_renews_the_lease(empty_redis: str, tmp_path: Any) -> None:
    """A turn that waits for more than two leases, claiming four times in each, is still alive afterwards."""
    endpoint = EndpointConfig(name="mixtral_chat", lease_s=1.0)
    with LiveServer(tmp_path, empty_redis, endpoint, worker_poll_s=2.2, worker_claim_s=0.25) as server:
        headers = {"Authorization": f"Bearer {server.worker_key}"}
        async with server.http() as http:
            async with http.post("/v1/worker/sessions", json=LOGIN, headers=headers) as answer:
                session = (await answer.json())["session"]
            await turn(http, headers, session=session, turn=1, room=4)
            assert (await turn(http, headers, session=session, turn=2, room=4, holding=[["mixtral_chat.0-" + "0" * 32, 1]])).turn == 2


async def test_turn_with_work_running_is_answered_at_once(http: aiohttp.ClientSession, as_worker: dict[str, str]) -> None:
    session = await login(http, as_worker)
    async with http.post("/v1/jobs", json=CHAT):
        pass
    (job,) = (await turn(http, as_worker, session=session, turn=1, room=1)).jobs
    frame = {"job": job.id, "attempt": job.attempt, "offset": 1, "ids": [5], "texts": ["a"]}
    answer = await turn(http, as_worker, session=session, turn=2, holding=[[job.id, job.attempt]], frames=[frame])
    assert (answer.turn, answer.jobs, answer.expect) == (2, [], [])
    assert (await state_of(http, job.id, "streaming"))["text"] == "a"


async def test_offset_beyond_the_log_is_answered_with_the_one_expected(http: aiohttp.ClientSession, as_worker: dict[str, str]) -> None:
    session = await login(http, as_worker)
    async with http.post("/v1/jobs", json=CHAT):
        pass
    (job,) = (await turn(http, as_worker, session=session, turn=1, room=1)).jobs
    frame = {"job": job.id, "attempt": job.attempt, "offset": 5, "ids": [5], "texts": ["a"]}
    answer = await turn(http, as_worker, session=session, turn=2, holding=[[job.id, job.attempt]], frames=[frame])
    assert [(one.job, one.offset) for one in answer.expect] == [(job.id, 1)]


async def test_logout_hands_every_job_back_at_once_and_ends_the_session(http: aiohttp.ClientSession, as_worker: dict[str, str]) -> None:
    session = await login(http, as_worker)
    async with http.post("/v1/jobs", json=CHAT):
        pass
    (job,) = (await turn(http, as_worker, session=session, turn=1, room=1)).jobs
    for released in (1, 0):
        async with http.delete(f"/v1/worker/sessions/{session}", headers=as_worker) as answer:
            assert (answer.status, await answer.json()) == (200, {"released": released})
    assert (await state_of(http, job.id, "waiting"))["position"] == 1
    async with http.post("/v1/worker/turn", json={"session": session, "turn": 2}, headers=as_worker) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (410, "session_lapsed")


@pytest.mark.parametrize("session", ["nonsense", "mixtral_chat.0-" + "0" * 32, "other.0-" + "0" * 32, ""])
async def test_turn_of_an_unknown_session_is_told_to_log_in_anew(
    http: aiohttp.ClientSession, as_worker: dict[str, str], session: str
) -> None:
    async with http.post("/v1/worker/turn", json={"session": session, "turn": 1}, headers=as_worker) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (410, "session_lapsed")


async def test_unknown_endpoint_and_too_old_protocol_are_refused(http: aiohttp.ClientSession, as_worker: dict[str, str]) -> None:
    async with http.post("/v1/worker/sessions", json=LOGIN | {"endpoint": "other"}, headers=as_worker) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "model_not_found")
    async with http.post("/v1/worker/sessions", json=LOGIN | {"protocol": 0}, headers=as_worker) as answer:
        assert answer.status == 400
        assert "speaks worker protocol 2 to 2; the worker speaks 0: update it" in (await answer.json())["error"]["message"]


async def test_newer_workers_unknown_fields_are_ignored(http: aiohttp.ClientSession, as_worker: dict[str, str]) -> None:
    await login(http, as_worker, protocol=PROTOCOL_VERSION + 1, news="x")


@pytest.mark.parametrize(
    "frame",
    [
        {"job": "x", "attempt": 1, "offset": 0},
        {"job": "x", "attempt": 1, "offset": 1, "ids": [1], "texts": []},
        {"job": "x", "attempt": 1, "offset": 1, "ids": [2**31], "texts": ["a"]},
        {"job": "x", "attempt": 1, "offset": 1, "ids": [0] * 65_537, "texts": ["a"] * 65_537},
        {"job": "x", "attempt": 1, "offset": 1, "finish": "stop", "release": True},
    ],
    ids=["offset 0", "texts short", "id too large", "too many", "two ends"],
)
async def test_wrong_frame_is_refused_and_touches_no_job(
    http: aiohttp.ClientSession, as_worker: dict[str, str], frame: dict[str, Any]
) -> None:
    session = await login(http, as_worker)
    async with http.post("/v1/worker/turn", json={"session": session, "turn": 1, "frames": [frame]}, headers=as_worker) as answer:
        assert answer.status == 400
        assert "frames[0]" in (await answer.json())["error"]["message"]


async def test_client_key_opens_no_worker_route_and_sees_no_job(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/jobs", json=CHAT | {"messages": [{"role": "user", "content": "secret words"}]}):
        pass
    for method, path, body in (
        ("POST", "/v1/worker/sessions", LOGIN),
        ("POST", "/v1/worker/turn", {"session": "x", "turn": 1}),
        ("DELETE", "/v1/worker/sessions/x", None),
    ):
        async with http.request(method, path, json=body) as answer:
            assert answer.status == 403
            assert "secret" not in await answer.text()


async def test_metrics_show_what_a_worker_said_in_its_last_turn_until_it_logs_out(
    http: aiohttp.ClientSession, as_worker: dict[str, str]
) -> None:
    async def shown() -> list[str]:
        async with http.get("/metrics") as answer:
            assert answer.status == 200
            return [line for line in (await answer.text()).splitlines() if line.startswith("mixtral_worker_")]

    session = await login(http, as_worker)
    assert await shown() == []
    async with http.post("/v1/jobs", json=CHAT) as answer:
        assert answer.status == 202
    telemetry = {"running": 1, "kv_blocks": 64, "forward_s_total": 1.5, "expert_imbalance": 1.25}
    (job,) = (await turn(http, as_worker, session=session, turn=1, room=4)).jobs
    await turn(http, as_worker, session=session, turn=2, room=3, holding=[[job.id, job.attempt]], telemetry=telemetry)
    labels = 'endpoint="mixtral_chat",worker="box"'
    assert await shown() == [
        f"mixtral_worker_running{{{labels}}} 1.0",
        f"mixtral_worker_kv_blocks{{{labels}}} 64.0",
        f"mixtral_worker_expert_imbalance{{{labels}}} 1.25",
        'mixtral_worker_step_seconds_total{endpoint="mixtral_chat",part="forward",worker="box"} 1.5',
    ]
    async with http.delete(f"/v1/worker/sessions/{session}", headers=as_worker) as answer:
        assert answer.ok
    assert await shown() == []


ODD: dict[str, Any] = {
    "unreadable": {"frames": [{"job": "x", "attempt": 1, "offset": 0}]},
    "job_never_had": {"frames": [{"job": "mixtral_chat.0-" + "0" * 32, "attempt": 1, "offset": 1, "ids": [1], "texts": ["x"]}]},
    "offset_beyond": {"frames": [{"job": "JOB", "attempt": 1, "offset": 9, "ids": [1], "texts": ["x"]}]},
    "text_too_long": {"frames": [{"job": "JOB", "attempt": 1, "offset": 1, "ids": [1], "texts": ["x" * 9000]}]},
}


@pytest.mark.parametrize("kind", ODD)
async def test_session_with_too_many_offences_is_cut_its_jobs_go_back_and_the_answer_says_why(
    empty_redis: str, tmp_path: Any, kind: str
) -> None:
    with LiveServer(tmp_path, empty_redis, worker_offences=3) as server:
        headers = {"Authorization": f"Bearer {server.worker_key}"}
        async with server.http() as http:
            session = await login(http, headers)
            jobs = []
            for _ in range(4):
                async with http.post("/v1/jobs", json=CHAT) as answer:
                    jobs.append((await answer.json())["id"])
            leased = await turn(http, headers, session=session, turn=1, room=4)
            assert [job.id for job in leased.jobs] == jobs
            holding = [[job.id, job.attempt] for job in leased.jobs]
            statuses = []
            for number in range(3):
                frames = [frame | {"job": frame["job"].replace("JOB", jobs[number])} for frame in ODD[kind]["frames"]]
                body = {"session": session, "turn": number + 2, "holding": holding, "frames": frames}
                async with http.post("/v1/worker/turn", json=body, headers=headers) as answer:
                    statuses.append(answer.status)
                    said = await answer.json()
            assert statuses == [400 if kind == "unreadable" else 200] * 2 + [410]
            assert said["error"]["code"] == "session_lapsed"
            assert f"was cut after 3 offences, 3 at most, the last: {kind}" in said["error"]["message"]
            async with http.get(f"/v1/jobs/{jobs[3]}") as answer:
                job = await answer.json()
            assert (job["state"], job["attempt"]) == ("waiting", 1)
            async with http.get("/metrics") as answer:
                assert f'mixtral_offences_total{{kind="{kind}"}} 3.0' in await answer.text()
            again = await login(http, headers)
            assert jobs[3] in [job.id for job in (await turn(http, headers, session=again, turn=1, room=4)).jobs]


async def test_late_frames_and_repeats_are_no_offences(empty_redis: str, tmp_path: Any) -> None:
    with LiveServer(tmp_path, empty_redis, worker_offences=1) as server:
        headers = {"Authorization": f"Bearer {server.worker_key}"}
        async with server.http() as http:
            session = await login(http, headers)
            async with http.post("/v1/jobs", json=CHAT) as answer:
                job_id = (await answer.json())["id"]
            (job,) = (await turn(http, headers, session=session, turn=1, room=1)).jobs
            frame = {"job": job.id, "attempt": job.attempt, "offset": 1, "ids": [1], "texts": ["x"]}
            for number in (2, 2, 3):
                await turn(http, headers, session=session, turn=number, holding=[[job.id, job.attempt]], frames=[frame])
            async with http.delete(f"/v1/jobs/{job_id}") as answer:
                assert answer.status == 200
            late = await turn(http, headers, session=session, turn=4, frames=[frame | {"offset": 2}])
            assert [drop.job for drop in late.drops] == [job_id]
            released = await turn(http, headers, session=session, turn=5, frames=[frame | {"offset": 3, "release": True}])
            assert [drop.job for drop in released.drops] == [job_id]


async def test_another_keys_session_is_not_counted_against(empty_redis: str, tmp_path: Any) -> None:
    with LiveServer(tmp_path, empty_redis, worker_offences=1) as server:
        headers = {"Authorization": f"Bearer {server.worker_key}"}
        other = {"Authorization": f"Bearer {await server.new_key('worker', user='mallory')}"}
        async with server.http() as http:
            session = await login(http, headers)
            for _ in range(3):
                body = f'{{"session": "{session}", "turn": 0}}'
                async with http.post("/v1/worker/turn", data=body, headers=other | {"Content-Type": "application/json"}) as answer:
                    assert answer.status == 400
            assert (await turn(http, headers, session=session, turn=1, holding=[["mixtral_chat.0-" + "0" * 32, 1]])).turn == 1


@pytest.mark.parametrize(
    "body",
    [
        {"turn": 2**63},
        {"turn": 1, "room": 2**31},
        {"turn": 1, "holding": [["x" * 201, 1]]},
        {"turn": 1, "holding": [["x", 2**31]]},
        {"turn": 1, "frames": [{"job": "x", "attempt": 2**31, "offset": 1}]},
        {"turn": 1, "frames": [{"job": "x", "attempt": 1, "offset": 2**31}]},
        {"turn": 1, "frames": [{"job": "x", "attempt": 1, "offset": 1, "prompt_tokens": 2**31}]},
    ],
)
async def test_counts_out_of_their_range_are_refused(http: aiohttp.ClientSession, as_worker: dict[str, str], body: dict[str, Any]) -> None:
    session = await login(http, as_worker)
    async with http.post("/v1/worker/turn", json=body | {"session": session}, headers=as_worker) as answer:
        assert answer.status == 400, await answer.text()
