"""AIME's worker wire: what its library relies on, a chat endpoint served by both kinds of worker, and endpoints that are no chat."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from mixtral_client.protocol import SessionRequest
from mixtral_server.aime_queue import AimeSession
from mixtral_server.endpoints import BUILT_IN, ClientTerms, EndpointConfig, WorkerTerms, sha256_of
from mixtral_server.routes.aime_workers import Worker
from support.aime_worker import NAME, VERSION, AimeWorker
from support.http import PATIENCE_S, state_of, until
from support.live_server import LiveServer
from support.native_events import Events
from support.scripted_worker import ScriptedWorker, answer_to, text_of

KEY = "a-workers-key"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def aime_worker(server: LiveServer) -> AsyncIterator[AimeWorker]:
    async with AimeWorker(server.url, server.worker_key) as worker:
        yield worker


async def post(server: LiveServer, path: str, body: Any, **more: Any) -> tuple[int, Any]:
    async with aiohttp.request("POST", server.url + path, json=body, **more) as answer:
        text = await answer.text()
        for key in (*(server.started.first_keys or {}).values(), KEY):
            assert key not in text
        return answer.status, json.loads(text)


def who(server: LiveServer, **more: Any) -> dict[str, Any]:
    """A worker that nothing is known of yet."""
    return {"auth": NAME, "job_type": "mixtral_chat", "auth_key": server.worker_key, "version": VERSION, "max_job_batch": 4, **more}


async def asked(server: LiveServer, **more: Any) -> Any:
    """The answer to one call for jobs."""
    status, body = await post(server, "/worker_job_request", who(server, **more))
    assert status == 200, body
    return body


async def known(server: LiveServer, *, is_known: bool = True, **more: Any) -> None:
    """Until the server knows the worker, or knows it no more."""
    async with asyncio.timeout(PATIENCE_S):
        while (await post(server, "/worker_check_server_status", who(server, **more)))[1]["logged_in"] != is_known:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def submitted(server: LiveServer, endpoint: str = "mixtral_chat", **params: Any) -> str:
    """The job's id, as AIME's clients know it."""
    params = {"key": server.client_key, "wait_for_result": False} | (params or {"prompt_input": "Once upon"})
    status, body = await post(server, f"/{endpoint}", params)
    assert status == 200, body
    job_id: str = body["job_id"]
    return job_id


async def leased(server: LiveServer, **more: Any) -> dict[str, Any]:
    """One job, in the hands of a worker that the test is itself."""
    command = await asked(server, **more)
    assert command["cmd"] == "job", command
    job: dict[str, Any] = command["job_data"][0]
    return job


async def told(server: LiveServer, *items: tuple[str, str, int], **more: Any) -> Any:
    """The answer to the progress of jobs: (id, text, tokens) of each."""
    body = [
        {
            "job_id": job_id,
            "job_type": "mixtral_chat",
            "auth_key": server.worker_key,
            "progress": tokens,
            "progress_data": {"text": text, "num_generated_tokens": tokens, "auth": NAME, "version": VERSION, **more},
        }
        for job_id, text, tokens in items
    ]
    status, answers = await post(server, "/worker_job_progress", body)
    assert (status, len(answers)) == (200, len(items))
    return answers


async def resulted(server: LiveServer, job_id: str, **outputs: Any) -> Any:
    status, answer = await post(server, "/worker_job_result", who(server, job_id=job_id) | outputs)
    assert status == 200
    return answer


async def progress(server: LiveServer, job_id: str, endpoint: str = "mixtral_chat") -> Any:
    async with aiohttp.request("GET", f"{server.url}/{endpoint}/progress", params={"job_id": job_id}) as answer:
        return await answer.json()


async def done(server: LiveServer, job_id: str, endpoint: str = "mixtral_chat") -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while (body := await progress(server, job_id, endpoint))["job_state"] != "done":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    result: dict[str, Any] = body["job_result"]
    return result


def native_id(job_id: str) -> str:
    """The id that the other wires know, from a client's or a worker's."""
    return job_id.partition("#")[0].partition(".0-")[0] + ".0-" + job_id.partition(".0-")[2][:32]


async def native_job(http: aiohttp.ClientSession, **more: Any) -> str:
    async with http.post("/v1/jobs", json={"model": "mixtral_chat", "messages": MESSAGES, **more}) as answer:
        assert answer.status == 202, await answer.text()
        job_id: str = (await answer.json())["id"]
        return job_id


# ---------------------------------------------------------------------------------------------- 4.1 to 4.3: calls for jobs


async def test_status_check_says_who_is_known_and_is_200_for_anybody(server: LiveServer) -> None:
    path = "/worker_check_server_status"
    assert await post(server, path, who(server)) == (200, {"cmd": "ok", "logged_in": False, "job_type_present": True, "key_valid": True})
    unknown = {"cmd": "ok", "logged_in": False, "job_type_present": False, "key_valid": False}
    for body in ({}, {"auth_key": None}, [], "x", {"job_type": ["x"]}, {"job_type": "nothing", "auth_key": server.worker_key}):
        assert await post(server, path, body) == (200, unknown)
    wrong = {"job_type": "mixtral_chat", "auth_key": server.client_key}
    assert await post(server, path, wrong) == (200, unknown | {"job_type_present": True})
    await post(server, "/worker_login", {"worker_parameters": who(server)})
    assert (await post(server, path, who(server)))[1]["logged_in"] is True


async def test_login_is_answered_with_the_request_timeout_or_with_why_not(server: LiveServer) -> None:
    model = {"label": "Mixtral", "quantization": "fp16", "size": "8x7B", "family": "Mixtral", "type": "LLM", "repo_name": "mistralai/x"}
    told = who(server) | {"gpu_name": "NVIDIA_H100", "num_gpus": 2, "max_batch_size": 16, "framework": "pytorch"}
    status, body = await post(server, "/worker_login", {"worker_parameters": told, "model_parameters": model})
    assert (status, body) == (200, {"success": True, "request_timeout": 60, "api_server_version": "0.9.6"})
    async with aiohttp.request("GET", server.url + "/api/mixtral_chat") as answer:
        shown = next(one for one in (await answer.json())["workers"] if one["name"] == NAME)
    assert (shown["max_batch_size"], shown["num_gpus"], shown["gpu_name"], shown["framework"]) == (16, 2, "NVIDIA_H100", "pytorch")
    assert shown["model"] == model
    for wrong in ({"job_type": "nothing"}, {"auth_key": "wrong"}, {"auth": 5}):
        status, body = await post(server, "/worker_login", {"worker_parameters": told | wrong})
        assert (status, body["success"], isinstance(body["error_msg"], str)) == (200, False, True)


async def test_call_for_jobs_with_a_version_logs_the_worker_in_and_without_one_is_told_to(server: LiveServer) -> None:
    body = who(server)
    del body["version"]
    assert await post(server, "/worker_job_request", body) == (
        200,
        {"cmd": "error", "msg": f"Worker {NAME} needs to login before being allowed to make job requests"},
    )
    await submitted(server)
    assert (await asked(server))["cmd"] == "job"
    await submitted(server)
    assert (await post(server, "/worker_job_request", body))[1]["cmd"] == "job"


@pytest.mark.parametrize("wrong", [{"auth_key": "wrong"}, {"auth_key": None}, {"job_type": "nothing"}, {"auth": ""}, {"auth_key": ["x"]}])
async def test_worker_that_may_not_ask_is_told_so_by_a_command(server: LiveServer, wrong: dict[str, Any]) -> None:
    answer = await asked(server, **wrong)
    assert (answer["cmd"], isinstance(answer["msg"], str)) == ("error", True)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff"])
async def test_call_for_jobs_that_cannot_be_read_is_told_so_by_a_command(server: LiveServer, raw: bytes) -> None:
    async with aiohttp.request("POST", server.url + "/worker_job_request", data=raw) as answer:
        assert (answer.status, (await answer.json())["cmd"]) == (200, "error")


async def test_job_carries_descriptions_and_the_validated_inputs_and_no_key(server: LiveServer) -> None:
    context = [{"role": "system", "content": "be short"}, *MESSAGES]
    await submitted(server, chat_context=json.dumps(context), prompt_input="", top_k=5, temperature=1, max_gen_tokens=7)
    command = await asked(server)
    assert (command["cmd"], command["endpoint_name"]) == ("job", "mixtral_chat")
    for name in ("input_descriptions", "progress_output_descriptions", "final_output_descriptions"):
        assert command[name]
        assert all(one["type"] for one in command[name].values())
    [job] = command["job_data"]
    assert job.pop("start_time") <= job.pop("start_time_compute")
    assert native_id(job.pop("job_id")).startswith("mixtral_chat.0-")
    own = {"prompt_input": "", "chat_context": context, "top_k": 5, "top_p": 0.9, "temperature": 1.0, "max_gen_tokens": 7}
    assert job == own
    assert set(command["input_descriptions"]) == set(own)


async def test_chat_of_another_wire_reaches_an_aime_worker_with_one_system_message(server: LiveServer, http: aiohttp.ClientSession) -> None:
    roles = [("developer", "be kind"), ("system", "be short"), ("user", "hello")]
    await native_job(http, messages=[{"role": role, "content": content} for role, content in roles], temperature=0.5)
    job = await leased(server)
    assert job["chat_context"] == [{"role": "system", "content": "be kind\n\nbe short"}, *MESSAGES]
    assert (job["prompt_input"], job["temperature"], job["max_gen_tokens"]) == ("", 0.5, 512)


async def test_waiting_call_is_given_a_job_the_moment_it_comes(server: LiveServer) -> None:
    call = asyncio.create_task(leased(server))
    await known(server)
    await submitted(server)
    assert (await call)["prompt_input"] == "Once upon"


async def test_call_without_work_is_answered_before_the_librarys_own_timeout(empty_redis: str, tmp_path: Path) -> None:
    chat = EndpointConfig(name="mixtral_chat", worker=WorkerTerms(request_timeout_s=1))
    with LiveServer(tmp_path, empty_redis, chat) as server:
        assert await asked(server) == {"cmd": "no_job"}
    usual = Worker(NAME, [AimeSession(EndpointConfig(name="mixtral_chat"), "key", NAME)])
    assert usual.poll_s == 54


async def test_what_waits_comes_as_one_batch_up_to_the_room_that_was_asked_for(server: LiveServer) -> None:
    for _ in range(6):
        await submitted(server)
    assert len((await asked(server, max_job_batch=4))["job_data"]) == 4
    assert len((await asked(server, max_job_batch=1, auth="another"))["job_data"]) == 1
    assert len((await asked(server, max_job_batch="x", auth="a third"))["job_data"]) == 1


async def test_batch_waits_a_moment_to_be_filled(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="mixtral_chat", batch_wait_ms=60_000)) as server:
        async with AimeWorker(server.url, server.worker_key, batch=3) as worker:
            for _ in range(3):
                assert not worker.batches
                await submitted(server)
            await until(lambda: [len(batch) for batch in worker.batches] == [3])


async def test_keen_worker_asks_for_its_free_slots_while_jobs_run(server: LiveServer) -> None:
    async with AimeWorker(server.url, server.worker_key, batch=3, pause_after=2, is_keen=True) as worker:
        ids = [await submitted(server)]
        await until(lambda: len(worker.seen) == 1)
        ids += [await submitted(server), await submitted(server)]
        await until(lambda: len(worker.seen) == 3)
        worker.go.set()
        for job_id in ids:
            assert (await done(server, job_id))["text"] == text_of("Once upon")
    assert len(worker.seen) == 3


async def test_waiting_call_ends_with_its_connection_and_the_worker_is_gone_at_once(server: LiveServer) -> None:
    worker = AimeWorker(server.url, server.worker_key)
    async with worker:
        await known(server)
        await worker.vanish()
        await known(server, is_known=False)
    await submitted(server)
    assert (await leased(server, auth="another"))["prompt_input"] == "Once upon"


async def test_second_call_of_a_worker_ends_its_first(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, worker_claim_s=0.05) as server:
        first = asyncio.create_task(asked(server))
        await known(server)
        second = asyncio.create_task(asked(server))
        assert await first == {"cmd": "no_job"}
        await submitted(server)
        assert (await second)["cmd"] == "job"


async def test_worker_serves_several_endpoints_of_one_job_type_each_batch_of_one(empty_redis: str, tmp_path: Path) -> None:
    chats = [EndpointConfig(name=name, worker=WorkerTerms(job_type="mixtral")) for name in ("one", "two")]
    with LiveServer(tmp_path, empty_redis, *chats) as server:
        ids = [(name, await submitted(server, name)) for name in ("one", "two", "one", "two")]
        async with AimeWorker(server.url, server.worker_key, job_type="mixtral") as worker:
            for name, job_id in ids:
                assert (await done(server, job_id, name))["text"] == text_of("Once upon")
            await until(lambda: len(worker.seen) == 4)
        assert {command["endpoint_name"] for command in worker.commands if command["cmd"] == "job"} == {"one", "two"}
        for command in worker.commands:
            assert all(job["job_id"].startswith(f"{command['endpoint_name']}.") for job in command.get("job_data", []))


async def test_key_of_the_endpoints_file_lets_workers_in_there_alone(empty_redis: str, tmp_path: Path) -> None:
    of_one = EndpointConfig(name="one", worker=WorkerTerms(job_type="x", auth_key_sha256=sha256_of(KEY)))
    two = EndpointConfig(name="two", worker=WorkerTerms(job_type="x"))
    with LiveServer(tmp_path, empty_redis, of_one, two) as server:
        job_id = await submitted(server, "two")
        async with AimeWorker(server.url, KEY, job_type="x") as worker:
            assert (await done(server, await submitted(server, "one"), "one"))["text"] == text_of("Once upon")
        assert [job["job_id"].partition(".")[0] for job in worker.seen] == ["one"]
        assert (await progress(server, job_id, "two"))["job_state"] == "queued"
        other = await server.new_key("worker", endpoints=["two"])
        status, body = await post(server, "/worker_job_request", who(server, job_type="one", auth_key=other))
        assert (status, body["cmd"]) == (200, "error")


async def test_worker_whose_key_is_revoked_while_it_waits_is_told_so(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, worker_claim_s=0.05, key_refresh_s=0.1) as server:
        key = await server.new_key("worker")
        call = asyncio.create_task(asked(server, auth_key=key))
        await known(server, auth_key=key)
        await server.revoke_key(key)
        assert (await call)["cmd"] == "error"


async def test_no_more_workers_of_one_key_than_the_endpoint_allows(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="mixtral_chat", sessions_per_key=1)) as server:
        await submitted(server)
        await leased(server)
        assert (await asked(server, auth="another"))["cmd"] == "warning"


# ---------------------------------------------------------------------------------------------- 4.4: progress


async def test_progress_is_the_whole_text_so_far_and_every_wire_shows_it(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await submitted(server)
    job = (await leased(server))["job_id"]
    assert await told(server, (job, "Once", 1)) == [{"success": True}]
    assert await told(server, (job, "Once upon a", 3)) == [{"success": True}]
    shown = (await progress(server, job_id))["progress"]
    assert (shown["progress"], shown["progress_data"]) == (3, {"text": "Once upon a", "num_generated_tokens": 3})
    async with Events(http, native_id(job_id)) as events:
        await until(lambda: events.offset == 3)
        assert [fields["text"] for _, fields in events.all] == ["Once", "", " upon a"]
        await resulted(server, job, text="Once upon a time", num_generated_tokens=4, current_context_length=6)
        assert await events.over() == ["token"] * 4 + ["done"]
    assert events.text == "Once upon a time"
    assert events.all[-1][1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6, "dropped_messages": 0}


async def test_reader_resumes_exactly_after_an_offset_of_a_text_without_ids(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = native_id(await submitted(server))
    job = (await leased(server))["job_id"]
    await told(server, (job, "Once ", 2))
    async with Events(http, job_id) as first:
        await until(lambda: first.offset == 2)
    await told(server, (job, "Once upon ", 4))
    async with Events(http, job_id, first.last_id) as second:
        await resulted(server, job, text="Once upon a time", num_generated_tokens=5)
        assert await second.over() == ["token"] * 3 + ["done"]
    assert [fields["offset"] for name, fields in second.all if name == "token"] == [3, 4, 5]
    assert "".join(fields["text"] for name, fields in second.all if name == "token") == "upon a time"


async def test_half_a_character_waits_for_its_other_half(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = native_id(await submitted(server))
    job = (await leased(server))["job_id"]
    await told(server, (job, "caf\ufffd", 2))
    async with Events(http, job_id) as events:
        await until(lambda: events.offset == 2)
        await told(server, (job, "café", 3))
        await resulted(server, job, text="café!", num_generated_tokens=4)
        assert "rewind" not in await events.over()
    assert events.text == "café!"


async def test_text_that_does_not_go_on_from_the_former_one_rewinds_readers(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await submitted(server)
    job = (await leased(server))["job_id"]
    await told(server, (job, "Once upon", 2))
    async with Events(http, native_id(job_id)) as events:
        await until(lambda: events.offset == 2)
        await told(server, (job, "Twice upon a", 3))
        await until(lambda: events.offset == 3)
        assert ("rewind", {"to": 0}) in events.all
        assert (await progress(server, job_id))["progress"]["progress_data"]["text"] == "Twice upon a"
        await resulted(server, job, text="Twice upon a time", num_generated_tokens=4)
        await events.over()
    assert events.text == "Twice upon a time"


async def test_stream_of_openais_ends_with_an_error_where_the_text_was_rewritten(server: LiveServer, http: aiohttp.ClientSession) -> None:
    has_begun = asyncio.Event()

    async def read() -> str:
        async with http.post("/v1/chat/completions", json={"model": "mixtral_chat", "messages": MESSAGES, "stream": True}) as answer:
            begun = await answer.content.readuntil(b"one two")
            has_begun.set()
            return begun.decode() + await answer.text()

    reading = asyncio.create_task(read())
    job = (await leased(server))["job_id"]
    await told(server, (job, "one two", 2))
    await has_begun.wait()
    await told(server, (job, "three four", 2))
    text = await reading
    assert "begins anew" in text.splitlines()[-2]
    assert "three" not in text
    assert "[DONE]" not in text


async def test_progress_counts_posts_where_a_worker_does_not_count_tokens(server: LiveServer) -> None:
    job_id = await submitted(server)
    job = (await leased(server))["job_id"]
    for text in ("a", "ab", "ab", "abc"):
        item = {"job_id": job, "auth": NAME, "auth_key": server.worker_key, "progress": 0.5, "progress_data": {"text": text}}
        assert await post(server, "/worker_job_progress", item) == (200, [{"success": True}])
    assert (await progress(server, job_id))["progress"]["progress_data"] == {"text": "abc", "num_generated_tokens": 3}


async def test_no_text_is_lost_by_a_worker_that_counts_beyond_what_was_asked(server: LiveServer) -> None:
    job_id = await submitted(server, prompt_input="x", max_gen_tokens=3)
    job = (await leased(server))["job_id"]
    for tokens in (2, 3, 50, 2**40):
        await told(server, (job, "word " * min(tokens, 60), tokens))
    await resulted(server, job, text="word " * 70, num_generated_tokens=70)
    result = await done(server, job_id)
    assert result["text"] == "word " * 70
    async with server.http() as http:
        view = await state_of(http, native_id(job_id), "done")
    assert (view["tokens"], view["finish"]) == (3, "length")


async def test_answer_to_progress_has_an_object_for_each_item_whatever_the_items_are(server: LiveServer) -> None:
    await submitted(server)
    job = (await leased(server))["job_id"]
    good = {"job_id": job, "auth_key": server.worker_key, "progress": 1, "progress_data": {"text": "a", "auth": NAME}}
    odd: list[Any] = [None, 5, "x", [], {}, {"job_id": 5}, {"job_id": "nonsense"}, {"job_id": f"{job}x"}, good | {"auth_key": "wrong"}]
    odd += [good | {"progress_data": None}, good | {"progress": None, "progress_data": {"text": 5, "auth": NAME}}, good]
    status, answers = await post(server, "/worker_job_progress", odd)
    assert (status, len(answers)) == (200, len(odd))
    assert all(isinstance(one, dict) and "job_id" not in one for one in answers)
    assert [one["success"] for one in answers] == [False] * 9 + [False, True, True]
    for raw in (b"", b"{", b"null"):
        async with aiohttp.request("POST", server.url + "/worker_job_progress", data=raw) as answer:
            assert (answer.status, len(await answer.json())) == (200, 1)


async def test_finished_job_in_a_list_of_progress_does_not_keep_the_others_from_being_taken(server: LiveServer) -> None:
    ids = [await submitted(server) for _ in range(2)]
    first, second = (job["job_id"] for job in (await asked(server))["job_data"])
    await resulted(server, first, text="done", num_generated_tokens=1)
    assert await told(server, (first, "done and more", 2), (second, "still", 1)) == [
        {"success": True, "canceled": True, "job_id": first},
        {"success": True},
    ]
    assert (await progress(server, ids[1]))["progress"]["progress_data"]["text"] == "still"
    assert (await done(server, ids[0]))["text"] == "done"


async def test_worker_of_a_cancelled_job_is_told_once(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await native_job(http)
    job = (await leased(server))["job_id"]
    await told(server, (job, "a", 1))
    async with http.delete(f"/v1/jobs/{job_id}") as answer:
        assert answer.status == 200
    assert await told(server, (job, "ab", 2)) == [{"success": True, "canceled": True, "job_id": job}]
    assert await told(server, (job, "abc", 3)) == [{"success": True}]
    assert (await resulted(server, job, text="abcd"))["cmd"] == "warning"
    assert (await state_of(http, job_id, "cancelled"))["text"] == "a"


async def test_library_never_goes_deaf_and_never_sends_in_a_circle(server: LiveServer, aime_worker: AimeWorker) -> None:
    for job_id in [await submitted(server) for _ in range(6)]:
        assert (await done(server, job_id))["text"] == text_of("Once upon")
    assert not aime_worker.is_deaf
    assert len(aime_worker.answers) == 6
    assert all(answer == {"cmd": "ok"} for answer in aime_worker.answers)


# ---------------------------------------------------------------------------------------------- 4.5: results


async def test_result_holds_declared_outputs_and_no_others_and_can_be_fetched_again(server: LiveServer) -> None:
    job_id = await submitted(server)
    job = (await leased(server))["job_id"]
    outputs = {"text": "a tale", "num_generated_tokens": 2, "model_name": "8x7b", "max_seq_len": 32_000, "current_context_length": 4}
    answer = await resulted(server, job, **outputs, secret="x", metrics={"a": 1}, arrival_time=1.5, pending_duration=0.25)
    assert answer == {"cmd": "ok"}
    for _ in range(2):
        result = await done(server, job_id)
        assert {name: result[name] for name in outputs} == outputs
        assert (result["arrival_time"], result["pending_duration"]) == (1.5, 0.25)
        assert not {"secret", "metrics", "auth", "auth_key", "key", "error"} & set(result)
        assert 0 < result["compute_duration"] <= max(0.001, result["total_duration"])


async def test_result_is_answered_200_whatever_it_is(server: LiveServer) -> None:
    job_id = await submitted(server)
    job = (await leased(server))["job_id"]
    for answer in (
        await resulted(server, f"{job}1"),
        await resulted(server, "nonsense"),
        await resulted(server, f"mixtral_chat.0-{'0' * 32}#1"),
        await resulted(server, job, auth="another"),
    ):
        assert answer["cmd"] == "warning"
    assert (await resulted(server, job, auth_key="wrong"))["success"] is False
    for raw in (b"", b"{", b"[]", b"null", b"5", b"\xff"):
        async with aiohttp.request("POST", server.url + "/worker_job_result", data=raw) as answered:
            assert (answered.status, (await answered.json())["cmd"]) == (200, "warning")
    assert (await resulted(server, job, text="once")) == {"cmd": "ok"}
    assert (await resulted(server, job, text="twice"))["cmd"] == "warning"
    assert (await done(server, job_id))["text"] == "once"


async def test_result_with_an_error_fails_the_job_and_readers_are_told_why(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await submitted(server)
    job = (await leased(server))["job_id"]
    await told(server, (job, "some", 1))
    await resulted(server, job, error="CUDA out of memory", text="some text")
    result = await done(server, job_id)
    assert (result["error"], result["text"]) == ("CUDA out of memory", "some")
    view = await state_of(http, native_id(job_id), "failed")
    assert view["error"] == {"message": "CUDA out of memory", "type": "server_error", "param": None, "code": "worker_failed"}


async def test_result_with_half_characters_and_numbers_that_are_none_is_mended(server: LiveServer) -> None:
    job_id = await submitted(server)
    job = (await leased(server))["job_id"]
    body = who(server, job_id=job, text="a \ud83d b", num_generated_tokens=float("nan"), model_name="m")
    async with aiohttp.request("POST", server.url + "/worker_job_result", data=json.dumps(body)) as answer:
        assert (answer.status, await answer.json()) == (200, {"cmd": "ok"})
    assert (await done(server, job_id))["text"] == "a ? b"


async def test_result_that_is_too_large_fails_the_job_with_its_size(empty_redis: str, tmp_path: Path) -> None:
    chat = EndpointConfig(name="mixtral_chat", max_output_bytes=2000)
    with LiveServer(tmp_path, empty_redis, chat, worker_body_limit_bytes=100_000) as server:
        job_id = await submitted(server)
        job = (await leased(server))["job_id"]
        await told(server, (job, "x" * 3000, 1))
        await resulted(server, job, text="x" * 3000)
        assert "bytes; 2,000 bytes at most" in (await done(server, job_id))["error"]
        async with aiohttp.request("POST", server.url + "/worker_job_result", data=b"x" * 200_000) as answer:
            assert (answer.status, (await answer.json())["cmd"]) == (200, "warning")


async def test_output_that_is_nested_too_deep_fails_its_job_and_no_other(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, IMAGES) as server:
        job_id = await submitted(server, "images", key=server.client_key, wait_for_result=False, prompt="x")
        job = (await leased(server, job_type="sd"))["job_id"]
        deep = "[" * 300 + "]" * 300
        for path, told in (
            ("/worker_job_progress", '"progress": 1, "progress_data": {"progress_images": DEEP}'),
            ("/worker_job_result", '"images": DEEP'),
        ):
            body = json.dumps(who(server, job_id=job))[:-1] + f", {told.replace('DEEP', deep)}}}"
            async with aiohttp.request("POST", server.url + path, data=body) as answer:
                assert answer.status == 200
        assert "nested deeper" in (await done(server, job_id, "images"))["error"]


async def test_result_names_its_worker_only_where_the_endpoint_says_so(empty_redis: str, tmp_path: Path) -> None:
    chat = EndpointConfig(name="mixtral_chat", clients=ClientTerms(provide_worker_meta_data=True), version=7)
    with LiveServer(tmp_path, empty_redis, chat) as server:
        async with AimeWorker(server.url, server.worker_key):
            result = await done(server, await submitted(server))
        assert (result["auth"], result["worker_interface_version"], result["ep_version"]) == (NAME, VERSION, 7)


# ---------------------------------------------------------------------------------------------- both kinds of worker


async def test_both_kinds_of_worker_serve_one_chat_endpoint(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with (
        ScriptedWorker(server.url, server.worker_key, slots=1) as native,
        AimeWorker(server.url, server.worker_key, batch=1) as other,
    ):
        for _ in range(20):
            ids = [await native_job(http) for _ in range(4)] + [native_id(await submitted(server))]
            for job_id in ids[:4]:
                assert (await state_of(http, job_id, "done"))["text"] == answer_to("hello")
            assert (await state_of(http, ids[4], "done"))["text"] == text_of("Once upon")
            if native.seen and other.seen:
                break
        assert native.seen
        assert other.seen


UNHONOURED: list[dict[str, Any]] = [
    {"stop": ["x"]},
    {"seed": 7},
    {"logprobs": True},
    {"prompt": [1, 2, 3], "messages": None},
    {"response_format": {"type": "json_object"}},
    {"logit_bias": {"5": 1.0}},
    {"presence_penalty": 0.5},
    {"repetition_penalty": 1.2},
    {"min_p": 0.1},
    {"min_tokens": 2},
    {"ignore_eos": True},
    {"stop_token_ids": [5]},
    {"truncate": "oldest_turns"},
    {"top_k": 0},
    {"temperature": 1.5},
]


@pytest.mark.parametrize("asked_for", UNHONOURED, ids=lambda one: next(iter(one)))
async def test_what_an_aime_worker_cannot_honour_waits_for_a_native_one(
    server: LiveServer, http: aiohttp.ClientSession, asked_for: dict[str, Any]
) -> None:
    body = {name: value for name, value in ({"messages": MESSAGES} | asked_for).items() if value is not None}
    body = {"model": "mixtral_chat", **body}
    async with http.post("/v1/jobs", json=body) as answer:
        assert answer.status == 202, await answer.text()
        closed = (await answer.json())["id"]
    async with AimeWorker(server.url, server.worker_key) as worker:
        for _ in range(2):
            assert (await done(server, await submitted(server)))["text"] == text_of("Once upon")
        assert closed not in {native_id(job["job_id"]) for job in worker.seen}
    assert (await state_of(http, closed, "waiting"))["attempt"] == 0
    async with ScriptedWorker(server.url, server.worker_key):
        await state_of(http, closed, "done")


async def test_native_workers_chat_that_has_begun_is_not_begun_anew_by_an_aime_worker(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="mixtral_chat", lease_s=1)) as server:
        async with server.http() as http:
            async with ScriptedWorker(server.url, server.worker_key, pause_after=4) as first:
                job_id = await native_job(http)
                async with asyncio.timeout(PATIENCE_S):
                    while (await state_of(http, job_id, "leased", "streaming", "waiting"))["tokens"] < 4:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                await first.vanish()
                await state_of(http, job_id, "waiting")
            async with AimeWorker(server.url, server.worker_key) as other:
                await done(server, await submitted(server))
                assert len(other.seen) == 1
            async with Events(http, job_id) as events, ScriptedWorker(server.url, server.worker_key):
                names = await events.over()
            assert (names.count("rewind"), events.text) == (0, answer_to("hello"))


async def test_native_worker_is_refused_at_an_endpoint_that_is_no_chat(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, IMAGES, EndpointConfig(name="mixtral_chat")) as server:
        login = SessionRequest(endpoint="images", name="w", protocol=2, version="0", model="m", device="cpu", max_slots=1, max_seq_len=1)
        headers = {"Authorization": f"Bearer {server.worker_key}"}
        status, body = await post(server, "/v1/worker/sessions", login.model_dump(), headers=headers)
        assert (status, "is no chat" in body["error"]["message"]) == (404, True)
        async with server.http() as http:
            async with http.get("/v1/models") as answer:
                assert [one["id"] for one in (await answer.json())["data"]] == ["mixtral_chat"]
            async with http.post("/v1/jobs", json={"model": "images", "messages": MESSAGES}) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (404, "model_not_found")
            async with http.get("/v1/page") as answer:
                assert (await answer.json())["model"] == "mixtral_chat"


# ---------------------------------------------------------------------------------------------- 4.6: workers that die


async def test_silent_worker_loses_its_jobs_and_they_start_anew_elsewhere(empty_redis: str, tmp_path: Path) -> None:
    chat = EndpointConfig(name="mixtral_chat", worker=WorkerTerms(request_timeout_s=2))
    with LiveServer(tmp_path, empty_redis, chat) as server:
        async with server.http() as http:
            job_id = await native_job(http)
            async with AimeWorker(server.url, server.worker_key, name="first", pause_after=4) as first, Events(http, job_id) as events:
                await until(lambda: events.offset == 4)
                await first.vanish()
                async with AimeWorker(server.url, server.worker_key, name="second"):
                    names = await events.over()
            assert [fields for name, fields in events.all if name == "rewind"] == [{"to": 0}]
            assert names[:4] == ["token"] * 4
            assert (names[-1], events.text) == ("done", answer_to("hello"))
            late = f"{job_id}#1"
            assert await told(server, (late, "late", 9)) == [{"success": True, "canceled": True, "job_id": late}]
            assert (await resulted(server, late, auth="first", text="late"))["cmd"] == "warning"
            assert (await state_of(http, job_id, "done"))["text"] == answer_to("hello")


async def test_worker_that_asks_for_all_its_slots_again_has_lost_what_it_held(server: LiveServer) -> None:
    ids = [await submitted(server) for _ in range(2)]
    before = [job["job_id"] for job in (await asked(server))["job_data"]]
    await told(server, (before[0], "some", 1))
    after = [job["job_id"] for job in (await asked(server))["job_data"]]
    assert sorted(map(native_id, after)) == sorted(map(native_id, before))
    assert set(after).isdisjoint(before)
    assert (await resulted(server, before[0], text="of the first attempt"))["cmd"] == "warning"
    for job in after:
        assert await resulted(server, job, text="of the second") == {"cmd": "ok"}
    assert [(await done(server, job_id))["text"] for job_id in ids] == ["of the second"] * 2


async def test_job_that_a_living_worker_says_nothing_of_goes_back(empty_redis: str, tmp_path: Path) -> None:
    chat = EndpointConfig(name="mixtral_chat", worker=WorkerTerms(job_silence_s=2))
    with LiveServer(tmp_path, empty_redis, chat, worker_claim_s=0.1) as server:
        async with AimeWorker(server.url, server.worker_key, name="forgetful", batch=2, pause_after=2, is_keen=True):
            job_id = await submitted(server)
            async with AimeWorker(server.url, server.worker_key, name="other"):
                assert (await done(server, job_id))["text"] == text_of("Once upon")


async def test_job_that_kills_every_aime_worker_is_given_up(server: LiveServer, http: aiohttp.ClientSession) -> None:
    job_id = await native_job(http)
    for _ in range(3):
        assert native_id((await leased(server, max_job_batch=1))["job_id"]) == job_id
    call = asyncio.create_task(asked(server, max_job_batch=1))
    view = await state_of(http, job_id, "dead")
    assert "3 workers died" in view["error"]["message"]
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


# ---------------------------------------------------------------------------------------------- 5: endpoints that are no chat

PIXEL = base64.b64encode(b"\x89PNG pixel").decode()
IMAGES = EndpointConfig.model_validate(
    {
        "name": "images",
        "category": "image",
        "version": 3,
        "max_output_bytes": 100_000,
        "worker": {"job_type": "sd", "auth_key": KEY},
        "inputs": {
            "prompt": {"type": "string", "required": True, "max_length": 20},
            "steps": {"type": "integer", "min": 0, "max": 50, "default": 20},
            "style": {"type": "selection", "supported": ["photo", "drawing", 0], "default": "photo"},
            "image": {"type": "image", "supported": ["png"], "max_bytes": 1000},
            "options": {"type": "json"},
        },
        "outputs": {"images": {"type": "image_list"}, "seed": {"type": "integer"}},
        "progress_outputs": {"progress_images": {"type": "image_list"}},
    }
)


def painted(data: Any, tokens: int) -> dict[str, Any]:
    return {"images": [f"data:image/png;base64,{PIXEL}"], "seed": 5, "progress_images": [PIXEL], "secret": "x"}


async def test_endpoint_with_inputs_of_its_own_is_served_by_an_aime_worker(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, IMAGES) as server:
        given = {"prompt": "a cat", "image": f"data:image/png;base64,{PIXEL}", "options": '{"a": [1]}', "steps": 30.0}
        async with AimeWorker(server.url, KEY, job_type="sd", outputs=painted, pause_after=4) as worker:
            job_id = await submitted(server, "images", **given)
            async with asyncio.timeout(PATIENCE_S):
                while (shown := (await progress(server, job_id, "images")).get("progress", {})).get("progress") != 4:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert shown["progress_data"] == {"progress_images": [PIXEL]}
            worker.go.set()
            result = await done(server, job_id, "images")
        assert (result["images"], result["seed"], result["ep_version"]) == ([f"data:image/png;base64,{PIXEL}"], 5, 3)
        assert not {"secret", "text", "num_generated_tokens", "progress_images"} & set(result)
        [job] = worker.seen
        assert {name: job[name] for name in ("prompt", "image", "options", "steps", "style")} == {
            "prompt": "a cat",
            "image": f"data:image/png;base64,{PIXEL}",
            "options": {"a": [1]},
            "steps": 30,
            "style": "photo",
        }
        assert worker.commands[0]["final_output_descriptions"] == {"images": {"type": "image_list"}, "seed": {"type": "integer"}}


async def test_blocking_call_of_an_endpoint_that_is_no_chat_answers_with_its_outputs(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, IMAGES) as server:
        async with AimeWorker(server.url, KEY, job_type="sd", outputs=painted):
            status, body = await post(server, "/images", {"key": server.client_key, "prompt": "a cat"})
        assert (status, body["success"], body["seed"]) == (200, True, 5)


async def test_inputs_that_break_their_description_are_refused_all_at_once(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, IMAGES) as server:
        wrong = {"steps": -1, "style": "oil", "image": "data:image/jpeg;base64,AAAA", "options": "{", "foo": 1}
        status, body = await post(server, "/images", {"key": server.client_key, **wrong})
        assert (status, body["ep_version"]) == (400, 3)
        assert body["error"] == [
            "Invalid input parameter(s): foo",
            "Missing required argument: prompt",
            "Parameter steps = -1 is too low. Min supported value for steps on this endpoint is 0!",
            "Parameter style = oil is not supported. Supported on this endpoint: photo, drawing, 0",
            "Parameter the format of image = jpeg is not supported. Supported on this endpoint: png",
            "Input parameter options={ has invalid json format!",
        ]


async def test_clients_key_of_an_endpoints_file_is_good_there_alone(empty_redis: str, tmp_path: Path) -> None:
    named = ClientTerms.model_validate({"authorization_keys": {"aime": "a-clients-key"}})
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="one", clients=named), EndpointConfig(name="two")) as server:
        key = {"key": "a-clients-key"}
        status, body = await post(server, "/one", {**key, "prompt_input": "x", "wait_for_result": False})
        assert (status, body["success"]) == (200, True)
        assert (await post(server, "/two", {**key, "prompt_input": "x"}))[0] == 402
        async with aiohttp.request("GET", server.url + "/one/login", params=key) as answer:
            session_key = (await answer.json())["client_session_auth_key"]
        by_session = {"client_session_auth_key": session_key, "prompt_input": "x", "wait_for_result": False}
        assert (await post(server, "/one", by_session))[0] == 200
        async with aiohttp.request("GET", server.url + "/api/endpoints", params=key) as answer:
            assert await answer.json() == {"endpoints": ["one"]}
        async with aiohttp.request(
            "POST", server.url + "/v1/chat/completions", headers={"Authorization": "Bearer a-clients-key"}
        ) as answer:
            assert answer.status == 401


# ---------------------------------------------------------------------------------------------- 6 and 9: OpenAI's clients, the benchmark


async def test_name_that_aimes_server_gives_openais_clients_is_that_of_the_shipped_chat(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, BUILT_IN) as server:
        async with AimeWorker(server.url, server.worker_key, "mixtral"), server.http() as http:
            async with http.post("/v1/chat/completions", json={"model": "mixtral-chat", "messages": MESSAGES}) as answer:
                body = await answer.json()
            assert (body["model"], body["choices"][0]["message"]["content"]) == ("mixtral_chat", answer_to("hello"))
            async with http.get("/metrics") as answer:
                assert 'mixtral_queue_workers{endpoint="mixtral_chat"} 1' in await answer.text()


async def test_stream_of_openais_is_served_by_an_aime_worker(server: LiveServer, aime_worker: AimeWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, max_retries=0) as client:
        models = [one.id async for one in await client.models.list()]
        assert models == ["mixtral_chat"]
        stream = await client.chat.completions.create(
            model="mixtral_chat",
            messages=[{"role": "user", "content": "hello"}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == answer_to("hello")
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (2, 10)
    assert aime_worker.seen[0]["temperature"] == 0


async def test_flow_of_aimes_benchmark(server: LiveServer) -> None:
    """Key, details, a worker that is there, then jobs by polls; the result has every number that it computes with."""
    key = {"key": server.client_key, "version": "Python AIME"}
    async with aiohttp.request("GET", server.url + "/api/validate_key", params=key) as answer:
        assert (await answer.json())["success"] is True
    async with AimeWorker(server.url, server.worker_key, batch=2, per_post=1):
        await known(server)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with aiohttp.request("GET", server.url + "/api/mixtral_chat", params=key) as answer:
                    details = await answer.json()
                if [one["max_batch_size"] for one in details["workers"]] == [2]:  # what is known of workers may be a second old
                    break
                await asyncio.sleep(0.05)
        shown = details["workers"][0]
        assert (shown["gpu_name"], shown["num_gpus"], shown["framework"]) == ("NVIDIA_H100", 1, "pytorch")
        sent = {"prompt_input": "Tell a very long story", "top_k": 1, "top_p": 1, "temperature": 0.8, "max_gen_tokens": 8}
        ids = [await submitted(server, key=server.client_key, wait_for_result=False, **sent) for _ in range(4)]
        results = [await done(server, job_id) for job_id in ids]
    assert [job_id.split("#")[1].isdecimal() for job_id in ids] == [True] * 4
    for result in results:
        assert (result["num_generated_tokens"], result["text"]) == (8, text_of("Tell a very long story", 8))
        for name in ("start_time", "start_time_compute", "arrival_time", "finished_time", "result_received_time", "total_duration"):
            assert isinstance(result[name], float), name
        assert result["compute_duration"] > 0
