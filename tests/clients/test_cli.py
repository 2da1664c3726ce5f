"""mixtral-chat as a real process: through a pipe, and in a terminal of its own."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from support.scripted_api import KEY, Fault, ScriptedApi, World

CLIENT = Path(__file__).resolve().parents[2] / "clients/python"
DEADLINE_S = 20.0


def environment(key: str = KEY) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CLIENT), "MIXTRAL_CLIENT_KEY": key, "TERM": "dumb"}


def command(world: World, *flags: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "mixtral_client.cli", "--api_server", world.url, *flags]


async def piped(world: World, text: str, *flags: str, key: str = KEY) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one run with text on stdin."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(*command(world, *flags), **pipes, env=environment(key))
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate(text.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def asked_messages(world: World) -> list[list[tuple[str, str]]]:
    bodies = [request["body"] for request in world.requests if request["kind"] == "POST"]
    return [[(message["role"], message["content"]) for message in body["messages"]] for body in bodies]


# ------------------------------------------------------------------------------------------------ pipes


async def test_pipe_is_one_message_and_its_answer_goes_to_stdout(api: ScriptedApi) -> None:
    world = api.script(logs=[["Once", " üpon", "\x1b[31m"]])
    flags = ("--system", "Be brief.", "--max_tokens", "9", "--temperature", "0", "--endpoint_name", "other")
    assert await piped(world, "Tell me\na story\n", *flags) == (0, "Once üpon\x1b[31m\n", "")
    body = world.requests[0]["body"]
    assert body.pop("messages") == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me\na story"}]
    assert body == {"model": "other", "max_tokens": 9, "temperature": 0}


async def test_json_prints_each_event_as_a_line(api: ScriptedApi) -> None:
    status, out, err = await piped(api.script(logs=[["Once"]]), "Hello", "--json")
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in lines] == ["queued", "token", "done"]
    assert lines[1] == {"event": "token", "offset": 1, "text": "Once"}


async def test_refusal_is_told_in_words_and_by_exit_status(api: ScriptedApi) -> None:
    refused = await piped(api.script(), "Hello", key="wrong")
    assert refused == (1, "", "invalid_api_key: this key is not known here; ask for one (request req-7)\n")
    status, out, _ = await piped(api.script(), "Hello", "--json", key="wrong")
    assert (status, json.loads(out)["error"]["code"]) == (1, "invalid_api_key")


async def test_failed_job_is_told_after_what_came_of_it(api: ScriptedApi) -> None:
    end = {"event": "error", "error": {"message": "out of memory", "type": "server_error", "code": "worker_failed"}}
    assert await piped(api.script(logs=[["Once"]], end=end), "Hello") == (1, "Once", "worker_failed: out of memory\n")


async def test_answer_that_lost_its_end_is_shown_again_from_its_start(api: ScriptedApi) -> None:
    world = api.script(logs=[["a", "b", {"event": "rewind", "to": 1}, {"cut": "end"}], ["a", "c"]])
    status, out, err = await piped(world, "Hello")
    assert (status, out) == (0, "abac\n")
    assert "the end of the answer was lost" in err


@pytest.mark.parametrize(
    ("flags", "text", "key", "words"),
    [
        ((), "", KEY, "stdin is not a terminal and holds no message"),
        ((), "Hello", "", "set MIXTRAL_CLIENT_KEY"),
        (("--api_server", "localhost"), "Hello", KEY, "such as http://127.0.0.1:7777"),
        (("--max_tokens", "many"), "Hello", KEY, "--max_tokens"),
    ],
)
async def test_wrong_call_ends_with_2_and_says_what_to_do(
    api: ScriptedApi, flags: tuple[str, ...], text: str, key: str, words: str
) -> None:
    world = api.script()
    status, out, err = await piped(world, text, *flags, key=key)
    assert (status, out, world.requests) == (2, "", [])
    assert words in err
    assert "Traceback" not in err


async def test_reader_that_leaves_a_pipe_cancels_the_job(api: ScriptedApi) -> None:
    # More than a pipe and its reader hold together, so that the program is still writing when its reader leaves.
    world = api.script(logs=[["x" * 400_000, "y" * 100_000, {"hold": True}]])
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(*command(world), **pipes, env=environment(), limit=10)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdin.write(b"Hello")
    process.stdin.close()
    async with asyncio.timeout(DEADLINE_S):
        await process.stdout.read(1)
        process.stdout._transport.close()  # type: ignore[attr-defined]
        assert (await process.stderr.read()).decode() == ""
        assert await process.wait() == 0
    assert list(world.history()["jobs"].values()) == ["cancelled"]


# ------------------------------------------------------------------------------------------------ terminals


class Terminal:
    """A process on a terminal of its own; `until` waits for words it shows after those waited for before."""

    def __init__(self, process: asyncio.subprocess.Process, master: int) -> None:
        self.process = process
        self.master = master
        self.shown = ""
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(master, self._read)

    def _read(self) -> None:
        try:
            self.shown += os.read(self.master, 65536).decode()
        except OSError:  # Linux: the other side is closed
            asyncio.get_running_loop().remove_reader(self.master)
        self._changed.set()

    async def until(self, words: str) -> str:
        async with asyncio.timeout(DEADLINE_S):
            while words not in self.shown:
                self._changed.clear()
                await self._changed.wait()
        before, _, self.shown = self.shown.partition(words)
        return before

    def type(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())


@pytest.fixture
async def terminal() -> AsyncIterator[Callable[..., Any]]:
    opened: list[Terminal] = []

    async def open_terminal(world: World, *flags: str) -> Terminal:
        master, slave = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *command(world, *flags), stdin=slave, stdout=slave, stderr=slave, env=environment(), start_new_session=True
        )
        os.close(slave)
        opened.append(Terminal(process, master))
        return opened[-1]

    yield open_terminal
    for one in opened:
        if one.process.returncode is None:
            one.process.kill()
            await one.process.wait()
        asyncio.get_running_loop().remove_reader(one.master)
        os.close(one.master)


async def test_chat_remembers_its_exchanges_until_reset(api: ScriptedApi, terminal: Callable[..., Any]) -> None:
    world = api.script(logs=[["Once", " upon"]])
    chat = await terminal(world)
    await chat.until("> ")
    for line in ("/system Be brief.", "Hello", "Go on", "/reset", "Anew", "/nonsense"):
        chat.type(line)
        await chat.until("> ")
    chat.type("/quit")
    async with asyncio.timeout(DEADLINE_S):
        assert await chat.process.wait() == 0
    system, hello, answer = ("system", "Be brief."), ("user", "Hello"), ("assistant", "Once upon")
    assert asked_messages(world) == [[system, hello], [system, hello, answer, ("user", "Go on")], [system, ("user", "Anew")]]


async def test_ctrl_c_stops_the_answer_cancels_the_job_and_keeps_the_chat(api: ScriptedApi, terminal: Callable[..., Any]) -> None:
    world = api.script(logs=[["Once", {"hold": True}], ["Twice"]])
    chat = await terminal(world)
    await chat.until("> ")
    chat.type("Hello")
    await chat.until("Once")
    chat.process.send_signal(signal.SIGINT)
    await chat.until("[stopped]")
    await chat.until("> ")
    assert world.history()["jobs"] == {"mixtral_chat.0-1": "cancelled"}
    chat.type("More")
    await chat.until("Twice")
    assert asked_messages(world)[1] == [("user", "Hello"), ("assistant", "Once"), ("user", "More")]


async def test_question_that_got_no_answer_is_not_remembered(api: ScriptedApi, terminal: Callable[..., Any]) -> None:
    world = api.script(faults=[Fault(on="POST", status=500, message="out of luck")])
    chat = await terminal(world)
    await chat.until("> ")
    chat.type("Hello")
    await chat.until("out of luck")
    chat.type("Again")
    await chat.until("upon a time")
    assert asked_messages(world) == [[("user", "Hello")], [("user", "Again")]]


async def test_answer_cannot_command_the_terminal(api: ScriptedApi, terminal: Callable[..., Any]) -> None:
    chat = await terminal(api.script(logs=[["a\x1b]0;title\x07b\rc\x9bd\te\nf", "."]]))
    await chat.until("> ")
    chat.type("Hello")
    shown = await chat.until("f.")
    assert "a�]0;title�b�c�d\te\r\n" in shown


async def test_ctrl_d_leaves(api: ScriptedApi, terminal: Callable[..., Any]) -> None:
    chat = await terminal(api.script())
    await chat.until("> ")
    os.write(chat.master, b"\x04")
    async with asyncio.timeout(DEADLINE_S):
        assert await chat.process.wait() == 0
