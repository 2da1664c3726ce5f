"""What holds for every route: the shape of errors, headers, limits on bodies and connections, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis
from aiohttp import web

from mixtral_client.protocol import PROTOCOL_VERSION
from mixtral_server.app import ROUTES, StartError, serve
from mixtral_server.door import listen, open_door
from mixtral_server.keys import Shard
from mixtral_server.metrics import Metrics
from mixtral_server.routes.service import Route, Stages
from mixtral_server.settings import Settings
from support.http import PATIENCE_S, state_of, text_of, until
from support.live_server import LiveServer
from support.redis import RedisProcess, connect, redis_binary
from support.scripted_worker import ScriptedWorker, answer_to

CHAT: dict[str, Any] = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]}
BODY_ROUTES = [route.path for route in ROUTES if isinstance(route, Route) and route.method == "POST"]


async def error_of(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    """The error object, which must be of OpenAI's shape."""
    body = await answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@asynccontextmanager
async def raw(server: LiveServer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.started.port)
    try:
        yield reader, writer
    finally:
        await shut(writer)


async def shut(writer: asyncio.StreamWriter) -> None:
    """Close it, and wait until it is closed; the server may have closed it first."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


# ---------------------------------------------------------------------------------------------- routes and headers


async def test_unknown_route_and_wrong_method_have_the_error_object(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/nothing") as answer:
        assert (answer.status, (await error_of(answer))["code"]) == (404, "route_not_found")
    async with http.put("/v1/jobs") as answer:
        error = await error_of(answer)
        assert (answer.status, error["code"], error["message"]) == (405, "method_not_allowed", "/v1/jobs takes POST; got PUT")
        assert answer.headers["Allow"] == "POST"


async def test_head_is_answered_where_no_key_is_needed_and_nowhere_else(http: aiohttp.ClientSession) -> None:
    for path in ("/", "/livez", "/metrics", "/page/chat.js"):
        async with http.head(path) as answer:
            assert (answer.status, await answer.read()) == (200, b"")
    for path in ("/v1/models", "/v1/jobs/x/events"):
        async with http.head(path) as answer:
            assert answer.status == 405


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", "/", "/livez", "/metrics"])
async def test_every_answer_has_a_request_id_and_the_security_headers(http: aiohttp.ClientSession, path: str) -> None:
    async with http.get(path) as answer:
        assert answer.headers["x-request-id"].startswith("req-")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Server"] == "mixtral-server"
        assert answer.headers["Cache-Control"] in ("no-store", "no-cache")


async def test_callers_own_request_id_comes_back_when_it_is_a_plain_word(http: aiohttp.ClientSession) -> None:
    async with http.get("/livez", headers={"x-request-id": "mine-1"}) as answer:
        assert answer.headers["x-request-id"] == "mine-1"
    async with http.get("/livez", headers={"x-request-id": "a b=c" * 40}) as answer:
        assert answer.headers["x-request-id"].startswith("req-")


async def test_what_is_not_http_is_answered_with_the_error_object(server: LiveServer) -> None:
    async with raw(server) as (reader, writer):
        writer.write(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        head, _, body = (await asyncio.wait_for(reader.read(), PATIENCE_S)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 400")
    assert json.loads(body)["error"]["code"] == "invalid_request"


# ---------------------------------------------------------------------------------------------- bodies


BROKEN = {
    "empty": b"",
    "not json": b"{broken",
    "bad utf-8": b'{"model": "\xff\xfe"}',
    "lone surrogate": b'{"model": "\\ud800"}',
    "nan": b'{"model": "mixtral_chat", "temperature": NaN}',
    "infinite": b'{"model": "mixtral_chat", "temperature": 1e999}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep list": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "list": b"[]",
    "null": b"null",
    "string": b'"x"',
    "number": b"1",
    "false": b"false",
    "nul": b"\0",
}


@pytest.mark.parametrize("path", BODY_ROUTES)
@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
async def test_body_that_cannot_be_read_is_refused_400_with_a_sentence(server: LiveServer, path: str, body: bytes) -> None:
    key = server.worker_key if "worker" in path else server.client_key
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(server.url) as http, http.post(path, data=body, headers=headers) as answer:
        assert answer.status == 400
        error = await error_of(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert "the body must be" in error["message"]


VALUES: list[Any] = [None, True, 0, -1, 10**40, 1.5, "x", "\0", [], [[]], {}, {"a": [1]}, ["x"] * 3, "9" * 5000]
FIELDS = {
    "/v1/chat/completions": [
        "model",
        "messages",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "max_tokens",
        "stream",
        "stream_options",
        "n",
        "user",
    ],
    "/v1/completions": ["model", "prompt", "max_tokens", "stop", "stream", "seed"],
    "/v1/jobs": ["model", "messages", "prompt", "priority", "queue_timeout_s", "max_tokens"],
    "/v1/worker/sessions": ["endpoint", "name", "protocol", "max_slots", "max_seq_len", "version"],
    "/v1/worker/turn": ["session", "turn", "holding", "frames", "room", "telemetry"],
}


@pytest.mark.parametrize("path", BODY_ROUTES)
async def test_no_value_of_any_field_makes_the_server_fail(empty_redis: str, tmp_path: Path, path: str) -> None:
    good: dict[str, Any] = {
        "/v1/chat/completions": CHAT | {"stream": True},
        "/v1/completions": {"model": "mixtral_chat", "prompt": "x", "stream": True},
        "/v1/jobs": CHAT,
        "/v1/worker/sessions": {
            "endpoint": "mixtral_chat",
            "name": "",
            "protocol": PROTOCOL_VERSION,
            "version": "",
            "model": "",
            "device": "",
            "max_slots": 1,
            "max_seq_len": 1,
        },
        "/v1/worker/turn": {"session": "mixtral_chat.0-" + "0" * 32, "turn": 1},
    }[path]
    with LiveServer(tmp_path, empty_redis, head_hold_s=0.0, worker_poll_s=0.0) as server:
        key = server.worker_key if "worker" in path else server.client_key
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(server.url, headers=headers) as http, ScriptedWorker(server.url, server.worker_key):
            for name in FIELDS[path]:
                for value in VALUES:
                    async with asyncio.timeout(PATIENCE_S):
                        answer = await http.post(
                            path, json=good | {name: value, "stream": value if name == "stream" else good.get("stream", False)}
                        )
                        assert answer.status in (200, 201, 202, 400, 404, 410), (name, value, await answer.text())
                        answer.close()


async def test_too_large_body_is_refused_before_it_is_sent(server: LiveServer) -> None:
    async with raw(server) as (reader, writer):
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.client_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {5 * 2**20}\r\n\r\n".encode()
        )
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
    assert head.startswith(b"HTTP/1.1 413")
    assert b"Connection: close" in head


async def test_too_large_body_is_refused_where_the_client_asks_first(server: LiveServer) -> None:
    async with raw(server) as (reader, writer):
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {2**30}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert (await asyncio.wait_for(reader.readline(), PATIENCE_S)).startswith(b"HTTP/1.1 413")


async def test_client_that_asks_first_is_told_to_go_on(server: LiveServer) -> None:
    body = json.dumps(CHAT).encode()
    async with raw(server) as (reader, writer):
        writer.write(
            f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.client_key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await asyncio.wait_for(reader.readline(), PATIENCE_S)).startswith(b"HTTP/1.1 202")


async def test_too_large_body_without_a_length_is_cut_at_the_limit(server: LiveServer) -> None:
    sent = 0
    async with raw(server) as (reader, writer):
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.client_key}\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        answer = asyncio.create_task(reader.readuntil(b"}}"))
        async with asyncio.timeout(PATIENCE_S):
            while not answer.done():
                if writer.transport.get_write_buffer_size() < 2**17:
                    writer.write(b"10000\r\n" + b" " * 2**16 + b"\r\n")
                    sent += 2**16
                await asyncio.sleep(0)
        head, _, body = (await answer).partition(b"\r\n\r\n")
        writer.transport.abort()  # what is not sent yet stays so
    assert head.startswith(b"HTTP/1.1 413")
    assert json.loads(body)["error"]["message"].startswith("the body may be 4,194,304 bytes at most; this one has more than")
    assert sent < 2**26


async def test_slow_body_is_cut_off_with_408(server: LiveServer) -> None:
    async with raw(server) as (reader, writer):
        writer.write(
            f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.client_key}\r\nContent-Type: application/json\r\n"
            f'Content-Length: 100\r\n\r\n{{"model"'.encode()
        )
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
    assert head.startswith(b"HTTP/1.1 408")
    assert b"Connection: close" in head


async def test_slow_head_is_cut_off(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, header_timeout_s=0.2) as server:
        async with raw(server) as (reader, writer):
            writer.write(b"GET /livez HTTP/1.1\r\nHost:")
            assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        async with raw(server) as (reader, writer):  # one that has asked something may stay longer
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"}"), PATIENCE_S)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.5)


async def test_compressed_body_is_refused_unread(http: aiohttp.ClientSession) -> None:
    bomb = gzip.compress(b" " * 2**24)
    for encoding in ("gzip", "deflate", "br", "GZIP"):
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        async with http.post("/v1/jobs", data=bomb, headers=headers) as answer:
            assert (answer.status, (await error_of(answer))["code"]) == (415, "wrong_content_type")


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_body_of_another_type_is_refused_415(http: aiohttp.ClientSession, content_type: str) -> None:
    async with http.post("/v1/jobs", data=json.dumps(CHAT).encode(), headers={"Content-Type": content_type}) as answer:
        assert answer.status == 415
        assert "must be JSON, Content-Type: application/json" in (await error_of(answer))["message"]


async def test_ten_thousand_turns_are_taken_and_one_more_is_refused(http: aiohttp.ClientSession) -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 5000]
    async with http.post("/v1/jobs", json=CHAT | {"messages": turns}) as answer:
        assert answer.status == 202
    async with http.post("/v1/jobs", json=CHAT | {"messages": [*turns, turns[0]]}) as answer:
        assert answer.status == 400
        assert "messages must have at most 10000 items" in (await error_of(answer))["message"]


# ---------------------------------------------------------------------------------------------- connections


async def test_connection_that_comes_while_the_server_ends_is_not_waited_for() -> None:
    runner = web.AppRunner(web.Application())
    await runner.setup()
    assert runner.server is not None
    listening = listen("127.0.0.1", 0)
    listener = await open_door(replace(Settings(), header_timeout_s=600.0), Metrics(), runner.server, listening)
    runner.server.pre_shutdown()  # what closes idle connections: the next comes too late for it
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    async with asyncio.timeout(PATIENCE_S):
        while not runner.server.connections:  # noqa: ASYNC110 - aiohttp tells nobody
            await asyncio.sleep(0.01)
        await runner.server.shutdown(None)
        assert await reader.read() == b""
    await shut(writer)
    listener.close()
    await runner.cleanup()


async def test_connections_over_the_limit_of_one_address_are_closed_and_a_place_is_free_again(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, max_connections_per_address=3) as server:
        held = [await asyncio.open_connection("127.0.0.1", server.started.port) for _ in range(3)]
        for _, writer in held:  # each has been let in once it is answered
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        for reader, _ in held:
            await asyncio.wait_for(reader.readuntil(b"}"), PATIENCE_S)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.started.port)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), PATIENCE_S)
        await shut(writer)
        for _, writer in held:
            await shut(writer)
        async with asyncio.timeout(PATIENCE_S), server.http() as http:
            while True:
                try:
                    async with http.get("/metrics") as answer:
                        text = await answer.text()
                    break
                except aiohttp.ClientConnectionError:
                    continue
    assert 'mixtral_connections_refused_total{why="max_connections_per_address"}' in text


@pytest.mark.parametrize("takes", ["nothing", "byte by byte"])
async def test_slow_reader_is_dropped_its_job_kept_and_others_served(empty_redis: str, tmp_path: Path, takes: str) -> None:
    with LiveServer(tmp_path, empty_redis, write_timeout_s=0.3) as server:
        long = WordyWorker(server.url, server.worker_key, pause_after=0, per_turn=16, length=3000)
        async with server.http() as http, long as worker:
            async with http.post("/v1/jobs", json=CHAT | {"max_tokens": 5000}) as answer:
                job_id = (await answer.json())["id"]
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                slow.connect(("127.0.0.1", server.started.port))
                slow.sendall(
                    f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.client_key}\r\n\r\n".encode()
                )
                assert slow.recv(12) == b"HTTP/1.1 200"
                worker.go.set()
                async with http.get(f"/v1/jobs/{job_id}/events") as answer:  # another reader of the same job
                    assert (await answer.read()).count(b"event: token") == 3000
                async with asyncio.timeout(PATIENCE_S):
                    while "mixtral_readers_dropped_total 1.0" not in await text_of(http, "/metrics"):
                        await asyncio.sleep(0.05)
                        with contextlib.suppress(ConnectionError):
                            slow.recv(1 if takes == "byte by byte" else 0)
            assert (await state_of(http, job_id, "done"))["tokens"] == 3000


class WordyWorker(ScriptedWorker):
    """Long tokens, so that an answer is larger than the buffers between server and reader."""

    def text(self, word: str) -> str:
        return word.ljust(250, ".")


# ---------------------------------------------------------------------------------------------- starting and stopping


async def test_taken_port_is_one_sentence(empty_redis: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = replace(Settings(), port=port, data_dir=str(tmp_path), redis_url=empty_redis)
        with pytest.raises(StartError, match=rf"port {port} on 127\.0\.0\.1 cannot be used: .*; end what holds it, or give another --port"):
            await serve(settings, {}, Stages(), lambda started: None)


async def test_leaving_server_says_so_first_and_goes_on_serving(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, ready_delay_s=60.0) as server:
        async with server.http() as http, ScriptedWorker(server.url, server.worker_key):
            async with http.get("/readyz") as answer:
                assert answer.status == 200
            server.leave()
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    async with http.get("/readyz") as answer:
                        if answer.status == 503:
                            break
                    await asyncio.sleep(0.01)
            assert "Retry-After" in answer.headers
            async with http.post("/v1/chat/completions", json=CHAT) as answer:
                assert answer.status == 200
            async with http.get("/livez") as answer:
                assert answer.status == 200


async def test_draining_server_ends_native_streams_at_an_event_and_lets_openai_streams_finish(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, shutdown_grace_s=60.0) as server:
        async with server.http() as http, ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker:
            openai = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
            first = await openai.content.readuntil(b"\n\n")
            job_id = json.loads(first.split(b"data: ")[1])["id"].removeprefix("chatcmpl-")
            native = await http.get(f"/v1/jobs/{job_id}/events")
            head = await native.content.readuntil(b"event: token")
            server.leave()
            rest = await asyncio.wait_for(native.content.read(), PATIENCE_S)
            assert (head + rest).startswith(b"retry: ")
            assert (head + rest).endswith(b"\n\n")
            assert b"event: done" not in head + rest
            async with http.post("/v1/jobs", json=CHAT) as refused:
                assert (refused.status, refused.headers["Connection"]) == (503, "close")
                assert "Retry-After" in refused.headers
            worker.go.set()
            text = (first + await asyncio.wait_for(openai.content.read(), PATIENCE_S)).decode()
    assert text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == answer_to("hello")


async def test_openai_stream_over_the_grace_ends_with_an_error_chunk_and_its_job_is_cancelled(
    one_redis: RedisProcess, empty_redis: str, tmp_path: Path
) -> None:
    with LiveServer(tmp_path / "a", empty_redis, shutdown_grace_s=0.1) as server:
        async with server.http() as http, ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker:
            stream = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
            whole = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
            await stream.content.readuntil(b"\n\n")
            await until(lambda: len(worker.seen) == 2)
            server.leave()
            text = (await asyncio.wait_for(stream.content.read(), PATIENCE_S)).decode()
            answer = await asyncio.wait_for(whole, PATIENCE_S)
            assert (answer.status, (await error_of(answer))["code"]) == (503, "unavailable")
            await worker.vanish()
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "unavailable"
    assert "[DONE]" not in text
    with LiveServer(tmp_path / "b", empty_redis) as other, RedisReader(one_redis) as reader:
        assert other.url
        assert {reader.state(job.id) for job in worker.seen} == {"cancelled"}


class RedisReader:
    """The state of a job as Redis holds it."""

    def __init__(self, process: RedisProcess) -> None:
        self._client = redis.Redis(unix_socket_path=str(process.socket), decode_responses=True)

    def __enter__(self) -> RedisReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def state(self, job_id: str) -> str:
        return str(self._client.hget(f"{{mixtral_chat.0}}:job:{job_id}", "state"))


async def test_waiting_worker_turn_is_answered_when_the_server_closes(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, worker_poll_s=60.0, shutdown_grace_s=0.0) as server:
        headers = {"Authorization": f"Bearer {server.worker_key}"}
        login = {
            "endpoint": "mixtral_chat",
            "name": "",
            "protocol": PROTOCOL_VERSION,
            "version": "",
            "model": "",
            "device": "",
            "max_slots": 1,
            "max_seq_len": 1,
        }
        async with aiohttp.ClientSession(server.url, headers=headers) as http:
            async with http.post("/v1/worker/sessions", json=login) as answer:
                session = (await answer.json())["session"]
            turn = asyncio.create_task(http.post("/v1/worker/turn", json={"session": session, "turn": 1, "room": 1}))
            async with connect(empty_redis) as redis, asyncio.timeout(PATIENCE_S):
                while await redis.hget(Shard("mixtral_chat").key(f"session:{session}"), "turn") != "1":  # noqa: ASYNC110 - of another thread
                    await asyncio.sleep(0.01)
            server.leave()
            answer = await asyncio.wait_for(turn, PATIENCE_S)
            assert (answer.status, (await answer.json())["jobs"]) == (200, [])


async def test_two_servers_share_keys_jobs_and_streams(empty_redis: str, tmp_path: Path) -> None:
    """One data folder, one Redis: any replica serves any request."""
    with LiveServer(tmp_path, empty_redis) as first, LiveServer(tmp_path, empty_redis) as second:
        assert second.started.first_keys is None
        headers = {"Authorization": f"Bearer {first.client_key}"}
        async with aiohttp.ClientSession(headers=headers) as http, ScriptedWorker(second.url, first.worker_key):
            async with http.post(f"{first.url}/v1/jobs", json=CHAT) as answer:
                job_id = (await answer.json())["id"]
            async with http.get(f"{second.url}/v1/jobs/{job_id}/events") as answer:
                assert b"event: done" in await answer.read()
            async with http.post(f"{first.url}/v1/chat/completions", json=CHAT) as answer:
                assert (await answer.json())["choices"][0]["message"]["content"] == answer_to("hello")


async def test_redis_that_is_away_is_503_with_retry_after_and_work_goes_on_when_it_is_back(tmp_path: Path) -> None:
    with RedisProcess(redis_binary("6.2"), "--appendonly", "yes") as process, LiveServer(tmp_path, process.url) as server:
        async with server.http() as http:
            async with http.post("/v1/jobs", json=CHAT) as answer:
                job_id = (await answer.json())["id"]
            process.stop()
            async with http.post("/v1/chat/completions", json=CHAT) as answer:
                assert (answer.status, (await error_of(answer))["code"]) == (503, "redis_unavailable")
                assert "Retry-After" in answer.headers
            async with http.get("/readyz") as answer:
                assert answer.status == 503
            async with http.get("/livez") as answer:
                assert answer.status == 200
            async with http.get("/metrics") as answer:
                assert "mixtral_redis_up 0.0" in await answer.text()
            process.start()
            async with ScriptedWorker(server.url, server.worker_key):
                assert (await state_of(http, job_id, "done"))["text"] == answer_to("hello")
