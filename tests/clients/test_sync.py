"""SyncClient: what scripts see, Ctrl-C included. What the client itself does is test_client.py's."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_client import JobStream, MixtralClient, Retry, SyncClient, SyncStream, Timeouts
from mixtral_client.errors import JobFailed, NotFound, TimedOut
from mixtral_client.protocol import TokenEvent
from mixtral_client.testing import FakeServer

CLIENT = Path(__file__).resolve().parents[2] / "clients/python"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(["Once", " upon"]) as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[SyncClient]:
    with SyncClient(server.url, server.api_key, retry=Retry(first_wait_s=0.001)) as client:
        yield client


def test_chat_and_complete_give_whole_answers(server: FakeServer, client: SyncClient) -> None:
    assert client.chat("Hello", max_tokens=5).text == "Once upon"
    assert client.complete("Once", seed=7).usage.completion_tokens == 2
    assert [request.body.get("seed") for request in server.asked("submit")] == [None, 7]


def test_stream_is_a_plain_iterator_that_survives_a_broken_connection(server: FakeServer, client: SyncClient) -> None:
    server.answer(["a", {"cut": "abort"}, "b"])
    with client.stream("Hello") as stream:
        offsets = [event.offset for event in stream if isinstance(event, TokenEvent)]
    assert (offsets, stream.text) == ([1, 2], "ab")
    assert len(server.asked("events")) == 2


def test_job_is_submitted_seen_followed_and_cancelled(server: FakeServer, client: SyncClient) -> None:
    server.answer(["a", {"hold": True}, "b"])
    job = client.submit("Hello")
    assert client.job(job.id).text == "a"
    with client.events(job.id) as reader:
        assert next(event for event in reader if isinstance(event, TokenEvent)).text == "a"
    assert (reader.job_id, reader.last_id.partition(".")[0]) == (job.id, "1")
    assert client.cancel(job.id).state == "cancelled"
    assert [model.id for model in client.models()] == ["mixtral_chat"]


def test_leaving_a_stream_leaves_its_job_running_and_cancel_ends_it(server: FakeServer, client: SyncClient) -> None:
    server.answer(["a", {"hold": True}])
    for event in (stream := client.stream("Hello")):
        if isinstance(event, TokenEvent):
            break
    stream.close()
    assert server.states == ["streaming"]
    stream.cancel()
    assert server.states == ["cancelled"]


def test_errors_and_limits_are_the_clients(server: FakeServer, client: SyncClient) -> None:
    server.answer([{"error": {"code": "out_of_memory", "message": "no room"}}], [{"hold": True}])
    with pytest.raises(JobFailed, match="no room"):
        client.chat("Hello")
    with pytest.raises(TimedOut):
        client.with_options(timeouts=Timeouts(total_s=1)).chat("Hello")
    with pytest.raises(NotFound):
        client.job("no")
    assert server.states == ["failed", "cancelled"]


def test_threads_share_one_client(server: FakeServer, client: SyncClient) -> None:
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(client.chat("Hello").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["Once upon"] * 8


async def test_call_inside_an_event_loop_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    client = SyncClient("http://127.0.0.1:1", "key")
    with pytest.raises(RuntimeError, match="use `await` with MixtralClient there"):
        client.chat("Hello")
    await asyncio.to_thread(client.close)


def test_closed_client_says_so_and_closes_twice(client: SyncClient) -> None:
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="was closed; make a new one"):
        client.models()


SCRIPT = """
import sys
from mixtral_client import SyncClient
with SyncClient(sys.argv[1], sys.argv[2]) as client:
    try:
        with client.stream("Hello") as stream:
            for event in stream:
                print(event.event, flush=True)
                if event.event == "token" and sys.argv[3] == "between":
                    input()
    except KeyboardInterrupt:
        print("stopped", client.job(stream.job_id).state, stream.text)
"""


@pytest.mark.parametrize("where", ["waiting", "between"])
def test_ctrl_c_cancels_the_job_and_is_a_keyboard_interrupt(server: FakeServer, where: str) -> None:
    server.answer(["a", {"hold": True}])
    script = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, server.url, server.api_key, where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CLIENT)},
    )
    try:
        assert script.stdout is not None
        assert [script.stdout.readline() for _ in range(2)] == ["queued\n", "token\n"]
        script.send_signal(signal.SIGINT)
        out, err = script.communicate(timeout=30)
    finally:
        script.kill()
        script.wait()
    assert (out, err, script.returncode) == ("stopped cancelled a\n", "", 0)


@pytest.mark.parametrize(("plain", "asynchronous"), [(SyncClient, MixtralClient), (SyncStream, JobStream)])
def test_every_call_has_its_plain_twin_with_the_same_arguments(plain: type, asynchronous: type) -> None:
    renamed = {"aclose": "close"}
    for name, method in inspect.getmembers(asynchronous, inspect.isfunction):
        if name.startswith("_") and (name != "__init__" or asynchronous is JobStream):
            continue
        twin = getattr(plain, renamed.get(name, name))
        assert list(inspect.signature(twin).parameters.values()) == list(inspect.signature(method).parameters.values()), name
