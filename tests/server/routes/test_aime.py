"""AIME's client wire, a test for each thing that its clients rely on, and for each in which this server is the better one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mixtral_client.protocol import FrameError, JobAccepted
from mixtral_server.endpoints import EndpointConfig
from support.http import PATIENCE_S, state_of, until
from support.live_server import LiveServer
from support.scripted_worker import ScriptedWorker, answer_to, text_of

CONTEXT = [{"role": "user", "content": "hello"}]
RAW_ANSWER = text_of("Once upon")

DRAWN = {"temperature", "top_p", "top_k"}


async def ask(server: LiveServer, method: str, path: str, **sent: Any) -> tuple[int, Any]:
    """Without the header that names a caller on every other wire."""
    async with aiohttp.request(method, server.url + path, **sent) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        text = await answer.text()
        for key in (server.started.first_keys or {}).values():
            assert key not in text
        return answer.status, json.loads(text)


async def submit(server: LiveServer, **params: Any) -> tuple[int, Any]:
    return await ask(server, "POST", "/mixtral_chat", json={"key": server.client_key, **params})


async def queued(server: LiveServer, **params: Any) -> str:
    """The job's id."""
    status, body = await submit(server, wait_for_result=False, **({"prompt_input": "Once upon"} | params))
    assert status == 200, body
    assert body == {"success": True, "job_id": body["job_id"], "ep_version": 2}
    job_id: str = body["job_id"]
    return job_id


async def progress(server: LiveServer, job_id: str) -> tuple[int, Any]:
    return await ask(server, "GET", "/mixtral_chat/progress", params={"job_id": job_id, "key": server.client_key})


async def progress_when(server: LiveServer, job_id: str, job_state: str, tokens: int = 0) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            _, body = await progress(server, job_id)
            if body["job_state"] == job_state and (job_state != "processing" or body["progress"]["progress"] >= tokens):
                return body
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------------------------------------- routes


async def test_any_page_may_ask_and_no_other_route_says_so(server: LiveServer, http: aiohttp.ClientSession) -> None:
    asks = {
        "Origin": "https://elsewhere.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    for path in ("/mixtral_chat", "/mixtral_chat/login", "/mixtral_chat/progress", "/api/validate_key", "/api/endpoints"):
        async with http.options(path, headers=asks) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, "*")
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]
            assert answer.headers["Access-Control-Allow-Headers"] == "Content-Type"
    for path in ("/v1/models", "/livez", "/"):
        async with http.get(path, headers=asks) as answer:
            assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    "path", ["/other_chat", "/other_chat/login", "/other_chat/progress", "/api/other_chat", "/api/endpoints/other_chat"]
)
async def test_name_that_is_no_endpoint_is_404(http: aiohttp.ClientSession, path: str) -> None:
    for method in ("GET", "POST"):
        async with http.request(method, path) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "route_not_found")


async def test_other_routes_keep_their_paths_and_methods(http: aiohttp.ClientSession) -> None:
    for path in ("/livez", "/metrics", "/v1/models"):
        async with http.get(path) as answer:
            assert answer.status == 200
        async with http.post(path) as answer:
            assert answer.status == 405
    async with http.delete("/mixtral_chat") as answer:
        assert answer.status == 405
    async with http.head("/mixtral_chat") as answer:
        assert answer.status == 405


async def test_endpoint_with_the_name_of_a_route_does_not_take_it(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="livez"), EndpointConfig(name="endpoints")) as server:
        async with server.http() as http, http.get("/livez") as answer:
            assert await answer.json() == {"status": "ok"}
        assert await ask(server, "GET", "/api/endpoints") == (200, {"endpoints": ["livez", "endpoints"]})


# ---------------------------------------------------------------------------------------------- keys and login


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_login_reads_the_query_and_gives_a_session_key_that_submits(server: LiveServer, method: str, worker: ScriptedWorker) -> None:
    query = {"user": "aime", "key": server.client_key, "version": "JavaScript AIME"}
    status, body = await ask(server, method, "/mixtral_chat/login", params=query, headers={"Content-type": "application/json"})
    assert status == 200
    assert body == {"success": True, "ep_version": 2, "client_session_auth_key": body["client_session_auth_key"]}
    session = {"key": None, "client_session_auth_key": body["client_session_auth_key"]}
    status, body = await submit(server, prompt_input="Once upon", **session)
    assert (status, body["text"]) == (200, RAW_ANSWER)


async def test_login_with_a_key_that_is_no_clients_is_200_without_success(server: LiveServer) -> None:
    for key in ("wrong", "", "schlüssel", server.worker_key):
        assert await ask(server, "POST", "/mixtral_chat/login", params={"key": key}) == (200, {"success": False, "error": "Key not valid"})
    assert await ask(server, "GET", "/mixtral_chat/login") == (200, {"success": False, "error": "Key not valid"})


async def test_session_key_serves_at_another_server_and_ends_with_its_api_key(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis) as one, LiveServer(tmp_path, empty_redis) as other:
        key = await one.new_key("client")
        _, body = await ask(one, "GET", "/mixtral_chat/login", params={"key": key})
        session_key = body["client_session_auth_key"]
        sent = {"client_session_auth_key": session_key, "prompt_input": "Once upon", "wait_for_result": False}
        status, body = await ask(other, "POST", "/mixtral_chat", json=sent)
        assert (status, body["success"]) == (200, True)
        assert (await progress(one, body["job_id"]))[1]["job_state"] == "queued"
        await one.revoke_key(key)
        async with asyncio.timeout(PATIENCE_S):
            while (await ask(other, "POST", "/mixtral_chat", json=sent))[0] != 401:  # noqa: ASYNC110 - another thread reads the keys anew
                await asyncio.sleep(0.05)


async def test_validate_key_reads_the_query_whatever_the_body_is(server: LiveServer) -> None:
    for method, sent in (("POST", {"json": False}), ("GET", {})):
        valid = await ask(server, method, "/api/validate_key", params={"key": server.client_key, "version": "x"}, **sent)
        assert valid == (200, {"success": True, "error": None})
        for params in ({"key": "wrong"}, {}):
            assert await ask(server, method, "/api/validate_key", params=params, **sent) == (
                200,
                {"success": False, "error": "Key not valid"},
            )


async def test_endpoints_are_all_or_those_of_the_key(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="one"), EndpointConfig(name="two")) as server:
        key = await server.new_key("client", endpoints=["two"])
        assert await ask(server, "GET", "/api/endpoints") == (200, {"endpoints": ["one", "two"]})
        assert await ask(server, "POST", "/api/endpoints", params={"key": key}) == (200, {"endpoints": ["two"]})
        assert await ask(server, "GET", "/api/endpoints", params={"key": "wrong"}) == (401, {"error": "Key not valid"})
        status, body = await ask(server, "POST", "/one", json={"key": key, "prompt_input": "x", "wait_for_result": False})
        assert (status, body["error"]) == (402, ["Client not authorized for endpoint one!"])
        _, body = await ask(server, "GET", "/one/login", params={"key": key})
        status, body = await ask(
            server, "POST", "/one", json={"client_session_auth_key": body["client_session_auth_key"], "prompt_input": "x"}
        )
        assert (status, body["error"]) == (402, ["Client not authorized for endpoint one!"])


@pytest.mark.parametrize("path", ["/api/endpoints/mixtral_chat", "/api/mixtral_chat"])
async def test_details_name_workers_room_and_parameters(server: LiveServer, worker: ScriptedWorker, path: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (body := (await ask(server, "GET", path))[1])["num_workers"] == 0:  # noqa: ASYNC110 - what is known of workers may be a second old
            await asyncio.sleep(0.05)
    assert (body["name"], body["title"], body["http_methods"], body["version"]) == ("mixtral_chat", "Mixtral", ["GET", "POST"], 2)
    assert (body["max_queue_length"], body["free_queue_slots"], body["max_time_in_queue"]) == (10_000, 10_000, 3600)
    assert (body["num_workers"], body["num_active_workers"]) == (1, 0)
    shown = body["workers"][0]
    assert (shown["name"], shown["state"], shown["max_batch_size"], shown["free_slots"]) == ("scripted", "waiting", 4, 4)
    assert (shown["gpu_name"], shown["model"]["label"]) == ("cpu", "none")
    assert body["parameter_description"]["input"]["top_k"] == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 40}
    assert {"client_session_auth_key", "key", "wait_for_result"} < set(body["parameter_description"]["input"])
    assert {"text", "num_generated_tokens"} <= set(body["parameter_description"]["progress"]["OUTPUTS"])
    assert body["parameter_description"]["output"]["text"] == {"type": "string"}


# ---------------------------------------------------------------------------------------------- submitting


@pytest.mark.parametrize("wait", [{}, {"wait_for_result": True}])
async def test_blocking_call_answers_with_the_result(server: LiveServer, worker: ScriptedWorker, wait: dict[str, bool]) -> None:
    status, body = await submit(server, prompt_input="Once upon", **wait)
    assert (status, body["success"], body["text"], body["num_generated_tokens"]) == (200, True, RAW_ANSWER, 10)
    assert body["ep_version"] == 2
    assert "job_state" not in body


async def test_chat_context_with_prompt_input_as_its_last_message_is_a_chat(server: LiveServer, worker: ScriptedWorker) -> None:
    before = [{"role": "system", "content": "be short"}, *CONTEXT, {"role": "assistant", "content": "hi"}]
    status, body = await submit(server, chat_context=json.dumps(before), prompt_input="and then?")
    assert (status, body["text"]) == (200, text_of("system: be short\nuser: hello\nassistant: hi\nuser: and then?"))
    status, body = await submit(server, chat_context=json.dumps(CONTEXT), prompt_input="")
    assert (status, body["text"]) == (200, answer_to("hello"))
    status, body = await submit(server, chat_context="[]", prompt_input="Once upon")
    assert (status, body["text"]) == (200, RAW_ANSWER)


async def test_sampling_reaches_the_worker_and_what_is_left_out_has_aimes_default(server: LiveServer, worker: ScriptedWorker) -> None:
    await submit(server, prompt_input="a", top_k=5, top_p=0.5, temperature=0, max_gen_tokens=7)
    await submit(server, prompt_input="b", top_k=None)
    await submit(server, prompt_input="c", top_k=5.0, temperature=1, top_p=0)
    given, default, cut = (one.spec for one in worker.seen)
    assert (given.sampling.model_dump(include=DRAWN), given.max_tokens) == ({"top_k": 5, "top_p": 0.5, "temperature": 0.0}, 7)
    assert (default.sampling.model_dump(include=DRAWN), default.max_tokens) == ({"top_k": 40, "top_p": 0.9, "temperature": 0.8}, 2000)
    # top_p 0 keeps the best token alone, which a worker knows as top_k 1
    assert cut.sampling.model_dump(include=DRAWN) == {"top_k": 1, "top_p": 1.0, "temperature": 1.0}


async def test_job_ids_are_new_and_numbered_behind_a_hash(server: LiveServer) -> None:
    first, second = await queued(server), await queued(server)
    numbers = [int(one.split("#")[1]) for one in (first, second)]
    assert numbers[1] == numbers[0] + 1
    assert first.split("#")[0] != second.split("#")[0]


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"foo": 1}, "Invalid input parameter(s): foo"),
        ({"top_k": "40"}, "Invalid argument type top_k=40. Expected: <class 'int'> but got <class 'str'>!"),
        ({"top_k": True}, "Invalid argument type top_k=True. Expected: <class 'int'> but got <class 'bool'>!"),
        ({"temperature": False}, "Invalid argument type temperature=False. Expected: <class 'float'> but got <class 'bool'>!"),
        ({"wait_for_result": "no"}, "Invalid argument type wait_for_result=no. Expected: <class 'bool'> but got <class 'str'>!"),
        ({"prompt_input": 5}, "Invalid argument type prompt_input=5. Expected: <class 'str'> but got <class 'int'>!"),
        ({"top_k": 2000}, "Parameter top_k = 2000 is too high. Max supported value for top_k on this endpoint is 1000!"),
        ({"top_k": 0}, "Parameter top_k = 0 is too low. Min supported value for top_k on this endpoint is 1!"),
        ({"top_p": 1.5}, "Parameter top_p = 1.5 is too high. Max supported value for top_p on this endpoint is 1!"),
        ({"temperature": -0.1}, "Parameter temperature = -0.1 is too low. Min supported value for temperature on this endpoint is 0!"),
        ({"max_gen_tokens": 40_000}, "Parameter max_gen_tokens = 40000 is too high."),
        ({"chat_context": "{bad"}, "Input parameter chat_context={bad has invalid json format!"),
        ({"chat_context": "{}"}, "Input parameter chat_context: must be a valid list; got an object"),
        ({"chat_context": '[{"role": "user"}]'}, "Input parameter chat_context: [0].content is missing"),
        ({"chat_context": json.dumps([*CONTEXT, *CONTEXT]), "prompt_input": ""}, "messages[1] must be of role assistant; got user"),
        ({"chat_context": CONTEXT}, "Invalid argument type chat_context=[{'role': 'user', 'content': '"),
        ({"prompt_input": ""}, "Missing required argument: prompt_input"),
    ],
)
async def test_parameter_that_breaks_a_rule_is_refused_in_aimes_words(server: LiveServer, params: dict[str, Any], error: str) -> None:
    status, body = await submit(server, **({"prompt_input": "x", "wait_for_result": False} | params))
    assert (status, body["success"], body["ep_version"], len(body["error"])) == (400, False, 2, 1)
    assert error in body["error"][0]


async def test_all_that_is_wrong_is_said_at_once(server: LiveServer) -> None:
    status, body = await submit(server, prompt_input="x", foo=1, top_k="40", top_p=2)
    assert (status, len(body["error"])) == (400, 3)


@pytest.mark.parametrize("sent", [{}, {"data": b"{"}, {"json": []}, {"json": False}, {"data": b'{"prompt_input": "\\ud800"}'}])
async def test_post_that_cannot_be_read_is_400(server: LiveServer, sent: dict[str, Any]) -> None:
    for path in ("/mixtral_chat", "/mixtral_chat/progress"):
        headers = {"Content-Type": "application/json"} if sent else {}
        status, body = await ask(server, "POST", path, headers=headers, **sent)
        assert (status, body["success"]) == (400, False)
        assert "body" in body["error"][0]


async def test_get_reads_the_query_with_numbers_as_numbers(server: LiveServer, worker: ScriptedWorker) -> None:
    query = {"key": server.client_key, "prompt_input": "12", "top_k": "7", "wait_for_result": "true"}
    status, body = await ask(server, "GET", "/mixtral_chat", params=query)
    assert (status, body["text"]) == (200, text_of("12"))
    assert worker.seen[0].spec.sampling.top_k == 7
    status, body = await ask(server, "GET", "/mixtral_chat", params=query | {"top_k": "seven"})
    assert (status, body["error"]) == (400, ["Invalid argument type top_k=seven. Expected: <class 'int'> but got <class 'str'>!"])


@pytest.mark.parametrize("key", ["wrong", 5, ["x"], "schlüssel", "a\nb"])
async def test_wrong_key_is_401(server: LiveServer, key: object) -> None:
    status, body = await ask(server, "POST", "/mixtral_chat", json={"key": key, "prompt_input": "x"})
    assert (status, body) == (401, {"success": False, "error": ["Key not valid"], "ep_version": 2})


@pytest.mark.parametrize("sent", [{}, {"key": None}, {"key": ""}, {"client_session_auth_key": "wrong"}, {"client_session_auth_key": 5}])
async def test_no_key_and_no_session_is_401_with_the_words_that_clients_log_in_again_at(server: LiveServer, sent: dict[str, Any]) -> None:
    status, body = await ask(server, "POST", "/mixtral_chat", json={"prompt_input": "x", **sent})
    assert status == 401
    assert "API Key missing and client session authentication key not registered in API Server" in body["error"]
    assert "Client session authentication key not registered in API Server" in body["error"]


async def test_header_and_cookie_of_other_wires_let_nobody_in(server: LiveServer) -> None:
    async with aiohttp.ClientSession(server.url, cookie_jar=aiohttp.CookieJar(unsafe=True)) as page:
        await page.get("/")
        headers = {"Authorization": f"Bearer {server.client_key}"}
        async with page.post("/mixtral_chat", json={"prompt_input": "x"}, headers=headers) as answer:
            assert answer.status == 401


async def test_full_queue_is_400_with_aimes_sentence(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="mixtral_chat", max_waiting=1)) as server:
        await queued(server)
        status, body = await submit(server, prompt_input="x", wait_for_result=False)
        assert (status, body["error"].startswith("Job queue reached max length 1!")) == (400, True)


async def test_job_of_a_blocking_client_that_leaves_is_given_up(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker:
        call = asyncio.create_task(submit(server, prompt_input="Once upon"))
        await until(lambda: bool(worker.seen))
        call.cancel()
        await asyncio.wait({call})
        await state_of(http, worker.seen[0].id, "cancelled")
        worker.go.set()
        assert (await submit(server, prompt_input="next"))[1]["text"] == text_of("next")


# ---------------------------------------------------------------------------------------------- progress


async def test_queued_job_shows_its_place_and_that_no_worker_is_there(server: LiveServer) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await ask(server, "GET", "/api/mixtral_chat"))[1]["num_workers"]:  # noqa: ASYNC110 - what is known may be a second old
            await asyncio.sleep(0.05)
    await queued(server)
    job_id = await queued(server)
    status, body = await progress(server, job_id)
    shown = {"progress": 0, "progress_data": {}, "queue_position": 2, "estimate": -1, "num_workers_online": 0}
    assert (status, body) == (200, {"success": True, "job_id": job_id, "ep_version": 2, "job_state": "queued", "progress": shown})


async def test_running_job_shows_its_whole_text_so_far_at_every_poll(server: LiveServer) -> None:
    async with ScriptedWorker(server.url, server.worker_key, per_turn=1, pause_after=4) as worker:
        job_id = await queued(server)
        body = await progress_when(server, job_id, "processing", tokens=4)
        again = (await progress(server, job_id))[1]
        shown = body["progress"]
        assert shown == again["progress"] | {"num_workers_online": shown["num_workers_online"]}
        assert (shown["progress"], shown["queue_position"], shown["estimate"] in (0, -1)) == (4, 0, True)
        assert shown["progress_data"] == {"text": text_of("Once upon", 4), "num_generated_tokens": 4}
        worker.go.set()
        assert (await progress_when(server, job_id, "done"))["job_result"]["text"] == RAW_ANSWER


async def test_result_is_handed_out_at_every_poll(server: LiveServer, worker: ScriptedWorker) -> None:
    job_id = await queued(server)
    first = await progress_when(server, job_id, "done")
    assert "progress" not in first
    result = first["job_result"]
    assert (result["text"], result["num_generated_tokens"], result["current_context_length"]) == (RAW_ANSWER, 10, 12)
    assert (result["success"], result["job_id"], result["ep_version"], result["model_name"]) == (True, job_id, 2, "mixtral_chat")
    assert 0 < result["compute_duration"] <= max(0.001, result["total_duration"])
    assert result["start_time"] <= result["start_time_compute"] <= result["result_received_time"]
    status, second = await progress(server, job_id)
    assert (status, second["job_result"]["text"]) == (200, RAW_ANSWER)


async def test_progress_by_post_reads_the_body(server: LiveServer) -> None:
    job_id = await queued(server)
    status, body = await ask(server, "POST", "/mixtral_chat/progress", json={"job_id": job_id})
    assert (status, body["job_state"]) == (200, "queued")


async def test_unknown_job_id_is_402_and_so_is_that_of_another_wire(server: LiveServer, http: aiohttp.ClientSession) -> None:
    status, body = await ask(server, "GET", "/mixtral_chat/progress")
    assert (status, body) == (402, {"success": False, "error": ["No job_id given"], "ep_version": 2})
    async with http.post("/v1/jobs", json={"model": "mixtral_chat", "messages": CONTEXT}) as answer:
        native = JobAccepted.model_validate(await answer.json()).id
    for job_id in ("nonsense", native, f"{native}#1", f"{native}.{'0' * 32}#1"):
        status, body = await progress(server, job_id)
        assert (status, body["error"]) == (402, [f"Client has no active request with this job id {job_id}"])
    status, body = await ask(server, "POST", "/mixtral_chat/progress", json={"job_id": 5})
    assert status == 402


async def test_failed_job_is_done_with_an_error_in_its_result(server: LiveServer) -> None:
    async with ScriptedWorker(server.url, server.worker_key, fail=FrameError(code="out_of_memory", message="out of memory")):
        body = await progress_when(server, await queued(server), "done")
        assert (body["success"], body["job_result"]["error"]) == (True, "out of memory")
        assert body["job_result"]["compute_duration"] > 0
        status, body = await submit(server, prompt_input="x")
        assert (status, body["error"]) == (200, "out of memory")


async def test_cancelled_job_is_done_with_an_error_so_that_no_client_polls_for_ever(
    server: LiveServer, http: aiohttp.ClientSession
) -> None:
    job_id = await queued(server)
    async with http.delete(f"/v1/jobs/{job_id.rpartition('.')[0]}") as answer:
        assert answer.status == 200
    status, body = await progress(server, job_id)
    assert (status, body["job_state"]) == (200, "done")
    assert "cancelled" in body["job_result"]["error"]


async def test_job_that_no_worker_began_in_time_is_400_lapsed(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="mixtral_chat", queue_timeout_s=0.05)) as server:
        job_id = await queued(server)
        body = await progress_when(server, job_id, "lapsed")
        assert (await progress(server, job_id))[0] == 400
        assert (body["success"], body["error"]) == (False, f"Job {job_id} on mixtral_chat lapsed!")
        assert body["progress"]["num_workers_online"] == 0
        status, body = await submit(server, prompt_input="x")
        assert (status, body["job_state"]) == (400, "lapsed")


async def test_job_whose_worker_died_keeps_its_text_and_goes_on(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="mixtral_chat", lease_s=1)) as server:
        async with ScriptedWorker(server.url, server.worker_key, pause_after=4) as first:
            job_id = await queued(server)
            await progress_when(server, job_id, "processing", tokens=4)
            await first.vanish()
            body = await progress_when(server, job_id, "queued")
            assert body["progress"]["progress_data"]["text"] == text_of("Once upon", 4)
        async with ScriptedWorker(server.url, server.worker_key):
            assert (await progress_when(server, job_id, "done"))["job_result"]["text"] == RAW_ANSWER
