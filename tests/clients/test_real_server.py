"""Both clients against the real server on a real Redis, with a worker that needs no model, through connections that break."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_client import MixtralClient, Timeouts
from mixtral_client.errors import JobFailed, NotAuthenticated, NotFound, RequestRefused, TimedOut
from mixtral_client.protocol import DoneEvent, FrameError, QueuedEvent, TokenEvent
from support.cutting_proxy import CuttingProxy
from support.live_server import LiveServer
from support.node import find_node
from support.scripted_worker import FULL_LENGTH, ScriptedWorker, answer_to

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0


@pytest.fixture
async def client(server: LiveServer) -> Any:
    async with MixtralClient(server.url, server.client_key) as client:
        yield client


def worker_of(server: LiveServer, **script: Any) -> ScriptedWorker:
    return ScriptedWorker(server.url, server.worker_key, **script)


async def until_state(client: MixtralClient, job_id: str, state: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await client.job(job_id)).state != state:  # noqa: ASYNC110 (the state is another program's)
            await asyncio.sleep(0.01)


async def output_of(*command: str, stdin: bytes = b"", **environment: str) -> str:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(*command, **pipes, env={**os.environ, **environment})
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate(stdin)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_python_client_reads_a_chat_whole_through_cut_connections(server: LiveServer) -> None:
    async with (
        CuttingProxy(server.url, cut_after=[420, 500]) as proxy,
        worker_of(server),
        MixtralClient(proxy.url, server.client_key) as client,
    ):
        stream = client.stream("Tell a story")
        events = [event async for event in stream]
        view = await client.job(stream.job_id)
    assert proxy.cuts == 2
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [token.offset for token in tokens] == list(range(1, FULL_LENGTH + 1))
    assert "".join(token.text for token in tokens) == answer_to("Tell a story") == view.text
    assert isinstance(events[-1], DoneEvent)
    assert events[-1].usage == view.usage
    assert view.state == "done"


async def test_javascript_client_reads_a_chat_whole_through_cut_connections(server: LiveServer) -> None:
    script = Path(__file__).parent / "javascript/read_chat.mjs"
    async with CuttingProxy(server.url, cut_after=[420, 500]) as proxy, worker_of(server):
        out = await output_of(str(find_node()), str(script), proxy.url, server.client_key, "Tell a story")
    assert proxy.cuts == 2
    events = [json.loads(line) for line in out.splitlines()]
    tokens = [event for event in events if event["event"] == "token"]
    assert [token["offset"] for token in tokens] == list(range(1, FULL_LENGTH + 1))
    assert "".join(token["text"] for token in tokens) == answer_to("Tell a story")
    assert (events[-1]["event"], events[-1]["finish"]) == ("done", "stop")


async def test_terminal_client_answers_a_pipe(server: LiveServer) -> None:
    async with worker_of(server):
        command = (sys.executable, "-m", "mixtral_client.cli", "--api_server", server.url)
        environment = {"PYTHONPATH": str(ROOT / "clients/python"), "MIXTRAL_CLIENT_KEY": server.client_key}
        assert await output_of(*command, stdin=b"Hello", **environment) == answer_to("Hello") + "\n"


async def test_job_is_followed_on_from_the_last_id(server: LiveServer, client: MixtralClient) -> None:
    accepted = await client.submit("Hello", idempotency_key="order-8")
    assert (await client.submit("Hello", idempotency_key="order-8")).id == accepted.id
    async with worker_of(server), client.events(accepted.id) as first:
        seen: list[str] = []
        async for event in first:
            if isinstance(event, TokenEvent):
                seen.append(event.text)
                if event.offset == 4:
                    break
        rest = [event.text async for event in client.events(accepted.id, first.last_id) if isinstance(event, TokenEvent)]
    assert "".join(seen + rest) == answer_to("Hello")


async def test_waiting_chat_knows_its_place_and_is_cancelled_when_asked_to(client: MixtralClient) -> None:
    async with client.stream("Hello") as stream:
        event = await anext(stream)
        assert isinstance(event, QueuedEvent)
        assert event.position == 1
        await stream.cancel()
        done = [event async for event in stream][-1]
    assert isinstance(done, DoneEvent)
    assert (done.finish, (await client.job(stream.job_id)).state) == ("cancelled", "cancelled")


async def test_running_chat_whose_task_is_cancelled_is_taken_from_its_worker(server: LiveServer, client: MixtralClient) -> None:
    has_token = asyncio.Event()
    stream = client.stream("Hello")

    async def read() -> None:
        async with stream:
            async for event in stream:
                if isinstance(event, TokenEvent):
                    has_token.set()

    async with worker_of(server, pause_after=2) as worker:
        reading = asyncio.create_task(read())
        await has_token.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert (await client.job(stream.job_id)).state == "cancelled"
        async with asyncio.timeout(DEADLINE_S):
            while stream.job_id not in worker.dropped:  # noqa: ASYNC110 (the worker has no event for it)
                await asyncio.sleep(0.01)


async def test_chat_whose_reader_leaves_runs_to_its_end_and_is_read_whole_later(server: LiveServer, client: MixtralClient) -> None:
    async with worker_of(server, pause_after=2) as worker:
        async with client.stream("Hello") as stream:
            async for event in stream:
                if isinstance(event, TokenEvent) and event.offset == 2:
                    break
        worker.go.set()
        await until_state(client, stream.job_id, "done")
    answer = await client.events(stream.job_id).answer()
    assert (answer.text, answer.finish) == (answer_to("Hello"), "stop")


async def test_limit_of_a_whole_answer_cancels_a_chat_that_no_worker_takes(client: MixtralClient) -> None:
    with pytest.raises(TimedOut, match="brought no token within first_token_s") as caught:
        await client.with_options(timeouts=Timeouts(first_token_s=2)).chat("Hello")
    assert (await client.job(caught.value.job_id)).state == "cancelled"


async def test_every_option_is_one_that_the_service_takes(server: LiveServer, client: MixtralClient) -> None:
    async with worker_of(server):
        answer = await client.chat(
            "Hello",
            max_tokens=4,
            min_tokens=1,
            temperature=0.5,
            top_p=0.5,
            top_k=3,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            logit_bias={5: 2.5},
            seed=7,
            stop=["never"],
            stop_token_ids=[2],
            ignore_eos=True,
            response_format={"type": "text"},
            logprobs=True,
            top_logprobs=2,
            truncate="oldest_turns",
            priority=1,
            queue_timeout_s=60,
        )
    assert (answer.finish, [len(one.top) for one in answer.logprobs]) == ("length", [2] * 4)


async def test_script_without_an_event_loop_reads_a_chat_whole_through_cut_connections(server: LiveServer) -> None:
    script = """
import sys
from mixtral_client import SyncClient
with SyncClient(sys.argv[1], sys.argv[2]) as client:
    print(client.chat("Tell a story").text, end="")
"""
    async with CuttingProxy(server.url, cut_after=[420, 500]) as proxy, worker_of(server):
        out = await output_of(sys.executable, "-c", script, proxy.url, server.client_key, PYTHONPATH=str(ROOT / "clients/python"))
    assert (proxy.cuts, out) == (2, answer_to("Tell a story"))


async def test_error_of_a_worker_reaches_the_caller_in_its_words(server: LiveServer, client: MixtralClient) -> None:
    fail = FrameError(code="context_length_exceeded", message="prompt is 9 tokens; this worker takes 8")
    async with worker_of(server, fail=fail):
        with pytest.raises(JobFailed, match="this worker takes 8") as caught:
            await client.chat("Hello")
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("ask", "kind", "code"),
    [
        (lambda client: client.chat("Hello", model="gpt-5"), NotFound, "model_not_found"),
        (lambda client: client.job("mixtral_chat.0-nope"), NotFound, "job_not_found"),
        (lambda client: client.cancel("nope"), NotFound, "job_not_found"),
        (
            lambda client: client.submit("b" * 20_000_000),
            RequestRefused,
            "body_too_large",
        ),
    ],
    ids=["model", "job", "cancel", "body"],
)
async def test_refusal_carries_the_services_code_sentence_and_request(
    client: MixtralClient, ask: Callable[[MixtralClient], Any], kind: type[RequestRefused], code: str
) -> None:
    with pytest.raises(kind) as caught:
        await ask(client)
    assert (caught.value.code, caught.value.status) == (code, 413 if code == "body_too_large" else 404)
    assert caught.value.request_id


async def test_wrong_key_is_not_authenticated(server: LiveServer) -> None:
    async with MixtralClient(server.url, "mxc_wrong") as client:
        with pytest.raises(NotAuthenticated) as caught:
            await client.models()
    assert caught.value.code == "invalid_api_key"
