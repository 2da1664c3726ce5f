"""mixtral-chat as a real process: through a pipe, and in a terminal of its own."""

from __future__ import annotations

import asyncio
import codecs
import fcntl
import json
import os
import pty
import signal
import sys
import termios
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_client import MixtralClient
from mixtral_client.testing import FakeServer, Fault
from support.scripted_api import KEY, ScriptedApi

CLIENT = Path(__file__).resolve().parents[2] / "clients/python"
DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program remembers which answer was coming."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/mixtral-chat/unfinished.json"


def environment(key: str = KEY) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CLIENT), "MIXTRAL_CLIENT_KEY": key, "TERM": "dumb"}


def command(world: FakeServer, *flags: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "mixtral_client.cli", "--api_server", world.url, *flags]


async def piped(world: FakeServer, text: str, *flags: str, key: str = KEY) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one run with text on stdin."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(*command(world, *flags), **pipes, env=environment(key))
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate(text.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def asked_messages(world: FakeServer) -> list[list[tuple[str, str]]]:
    return [[(message["role"], message["content"]) for message in request.body["messages"]] for request in world.asked("submit")]


# ------------------------------------------------------------------------------------------------ pipes


async def test_pipe_is_one_message_and_its_answer_goes_to_stdout(api: ScriptedApi) -> None:
    world = api.script(["Once", " üpon", "\x1b[31m"])
    flags = ("--system", "Be brief.", "--max_tokens", "9", "--temperature", "0", "--endpoint_name", "other")
    assert await piped(world, "Tell me\na story\n", *flags) == (0, "Once üpon\x1b[31m\n", "")
    body = world.requests[0].body
    assert body.pop("messages") == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me\na story"}]
    assert body == {"model": "other", "max_tokens": 9, "temperature": 0}


async def test_json_prints_each_event_as_a_line(api: ScriptedApi) -> None:
    status, out, err = await piped(api.script(["Once"]), "Hello", "--json")
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in lines] == ["queued", "token", "done"]
    assert lines[1] == {"event": "token", "offset": 1, "text": "Once"}


async def test_refusal_is_told_in_words_and_by_exit_status(api: ScriptedApi) -> None:
    refused = await piped(api.script(), "Hello", key="wrong")
    assert refused == (1, "", "invalid_api_key: this key is not known here; ask for one (request req-1)\n")
    status, out, _ = await piped(api.script(), "Hello", "--json", key="wrong")
    assert (status, json.loads(out)["error"]["code"]) == (1, "invalid_api_key")


async def test_failed_job_is_told_after_what_came_of_it(api: ScriptedApi) -> None:
    world = api.script(["Once", {"error": {"message": "out of memory", "code": "worker_failed"}}])
    assert await piped(world, "Hello") == (1, "Once", "worker_failed: out of memory (request req-2)\n")


async def test_answer_that_lost_its_end_is_shown_again_from_its_start(api: ScriptedApi) -> None:
    world = api.script(["a", "b", {"cut": "end"}, {"rewind": 1}, "c"])
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
    world = api.script(["x" * 400_000, "y" * 100_000, {"hold": True}])
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
    assert world.states == ["cancelled"]


async def test_message_of_the_command_line_stands_before_what_is_piped_in(api: ScriptedApi) -> None:
    world = api.script("Once")
    assert await piped(world, "a\nb\n", "Sum", "up:") == (0, "Once\n", "")
    assert await piped(world, "", "Hello") == (0, "Once\n", "")
    assert asked_messages(world) == [[("user", "Sum up:\n\na\nb")], [("user", "Hello")]]


async def test_sampling_flags_travel_as_given(api: ScriptedApi) -> None:
    world = api.script("Once")
    numbers = {"top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 7, "priority": 2}
    flags = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    flags += ["--stop", "x", "--stop", "y"]
    await piped(world, "Hello", *flags)
    body = world.requests[0].body
    del body["messages"], body["model"]
    assert body == numbers | {"stop": ["x", "y"]}


async def test_history_file_carries_a_chat_from_run_to_run(api: ScriptedApi, tmp_path: Path) -> None:
    world = api.script("one", "two")
    file = tmp_path / "chat.json"
    assert await piped(world, "first", "--history", str(file), "--system", "Be brief.") == (0, "one\n", "")
    assert await piped(world, "second", "--history", str(file)) == (0, "two\n", "")
    before = [("system", "Be brief."), ("user", "first")]
    assert asked_messages(world) == [before, [*before, ("assistant", "one"), ("user", "second")]]
    assert [one["content"] for one in json.loads(file.read_text())["messages"]] == ["first", "one", "second", "two"]
    assert file.stat().st_mode & 0o777 == 0o600


async def test_history_file_that_is_none_is_left_alone_and_named(api: ScriptedApi, tmp_path: Path) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("Dear Sir")
    world = api.script()
    status, out, err = await piped(world, "Hello", "--history", str(file))
    assert (status, out, world.requests, file.read_text()) == (2, "", [], "Dear Sir")
    assert f"{file} holds no conversation" in err


async def test_answer_that_a_killed_program_was_reading_is_resumed_whole_by_the_next(api: ScriptedApi, state: Path, tmp_path: Path) -> None:
    world = api.script(["Once", {"hold": True}, " upon"])
    file = tmp_path / "chat.json"
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(*command(world, "Hello"), **pipes, env=environment())
    assert process.stdin
    assert process.stdout
    process.stdin.close()
    async with asyncio.timeout(DEADLINE_S):
        assert await process.stdout.read(4) == b"Once"
    process.kill()
    await process.wait()
    assert world.states == ["streaming"]
    assert state.stat().st_mode & 0o777 == 0o600  # noqa: ASYNC240
    world.release()
    resumed = [word for word in command(world, "--resume", "--history", str(file)) if word not in ("--api_server", world.url)]
    again = await asyncio.create_subprocess_exec(*resumed, **pipes, env=environment())
    async with asyncio.timeout(DEADLINE_S):
        out, err = await again.communicate()
    assert (again.returncode, out.decode(), err.decode()) == (0, "Once upon\n", "")
    assert [one["content"] for one in json.loads(file.read_text())["messages"]] == ["Hello", "Once upon"]
    status, _, err_text = await piped(world, "", "--resume")
    assert (status, state.exists()) == (2, False)  # noqa: ASYNC240
    assert "no answer was left unfinished here" in err_text


async def test_any_job_is_read_by_its_id(api: ScriptedApi, connect: Callable[..., MixtralClient]) -> None:
    world = api.script("Once upon a time")
    job = await connect(world.url).submit("Hello")
    assert await piped(world, "", "--resume", job.id) == (0, "Once upon a time\n", "")
    status, out, err = await piped(world, "", "--resume", "no")
    assert (status, out) == (1, "")
    assert "job_not_found" in err


async def test_service_that_is_full_ends_with_75_so_that_a_script_may_try_again(api: ScriptedApi) -> None:
    world = api.script(faults=[Fault("submit", 429, "queue_full", "the queue is full", retry_after="3600")])
    assert await piped(world, "Hello") == (75, "", "queue_full: the queue is full (request req-1)\n")


async def test_answer_that_takes_too_long_is_given_up_and_cancelled(api: ScriptedApi, state: Path) -> None:
    world = api.script(["Once", {"hold": True}])
    status, out, err = await piped(world, "Hello", "--timeout_s", "2")
    assert (status, out, world.states, state.exists()) == (75, "Once", ["cancelled"], False)  # noqa: ASYNC240
    assert err.startswith("total_timeout: job mixtral_chat.0-1 was not finished within total_s, 2 s")


async def test_answer_that_another_cancelled_or_no_worker_began_is_no_success(api: ScriptedApi) -> None:
    world = api.script(["Once", {"done": {"finish": "cancelled"}}], [{"done": {"finish": "expired"}}])
    assert await piped(world, "Hello") == (1, "Once\n", "[cancelled]\n")
    assert await piped(world, "Hello") == (75, "\n", "[expired]\n")


async def test_ctrl_c_before_the_question_is_whole_ends_quietly(api: ScriptedApi) -> None:
    world = api.script()
    questions, pen = os.pipe()
    pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(*command(world), stdin=questions, **pipes, env=environment())
    os.write(pen, b"Tell me")
    async with asyncio.timeout(DEADLINE_S):
        while fcntl.ioctl(questions, termios.FIONREAD, bytes(4)) != bytes(4):  # noqa: ASYNC110 (it has yet to read that)
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    os.close(questions)
    os.close(pen)
    assert (process.returncode, out, err, world.requests) == (130, b"", b"", [])


async def test_letters_that_a_terminal_lacks_cost_no_answer(api: ScriptedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert await piped(api.script(["Once", " üpon", " 😀"]), "Hello") == (0, "Once ?pon ?\n", "")


async def test_unwritable_state_costs_no_answer(api: ScriptedApi, state: Path) -> None:
    state.parent.parent.write_text("a file where a folder should be")
    assert await piped(api.script("Once"), "Hello") == (0, "Once\n", "")


async def test_help_teaches_by_examples(api: ScriptedApi) -> None:
    status, out, err = await piped(api.script(), "", "--help")
    assert (status, err) == (0, "")
    assert 'head -50 README.md | mixtral-chat "Sum this up' in out
    assert "/save FILE" in out


# ------------------------------------------------------------------------------------------------ terminals


class Terminal:
    """A process on a terminal of its own; `until` waits for words it shows after those waited for before."""

    def __init__(self, process: asyncio.subprocess.Process, master: int) -> None:
        self.process = process
        self.master = master
        self.shown = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(master, self._read)

    def _read(self) -> None:
        try:
            self.shown += self._utf8.decode(os.read(self.master, 65536))
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

    async def open_terminal(world: FakeServer, *flags: str) -> Terminal:
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
    world = api.script(["Once", " upon"])
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
    world = api.script(["Once", {"hold": True}], ["Twice"])
    chat = await terminal(world)
    await chat.until("> ")
    chat.type("Hello")
    await chat.until("Once")
    chat.process.send_signal(signal.SIGINT)
    await chat.until("[stopped]")
    await chat.until("> ")
    assert world.states == ["cancelled"]
    chat.type("More")
    await chat.until("Twice")
    assert asked_messages(world)[1] == [("user", "Hello"), ("assistant", "Once"), ("user", "More")]


async def test_question_that_got_no_answer_is_not_remembered(api: ScriptedApi, terminal: Callable[..., Any]) -> None:
    world = api.script(faults=[Fault(on="submit", status=500, message="out of luck")])
    chat = await terminal(world)
    await chat.until("> ")
    chat.type("Hello")
    await chat.until("out of luck")
    chat.type("Again")
    await chat.until("upon a time")
    assert asked_messages(world) == [[("user", "Hello")], [("user", "Again")]]


async def test_answer_cannot_command_the_terminal(api: ScriptedApi, terminal: Callable[..., Any]) -> None:
    chat = await terminal(api.script(["a\x1b]0;title\x07b\rc\x9bd\te\nf", "."]))
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


async def test_chat_is_saved_shown_and_loaded_again(api: ScriptedApi, terminal: Callable[..., Any], tmp_path: Path) -> None:
    world = api.script("Once")
    chat = await terminal(world)
    await chat.until("> ")
    for line in ("Hello", f"/save {tmp_path}/a.json", "/reset", "/show"):
        chat.type(line)
        await chat.until("> ")
    assert json.loads((tmp_path / "a.json").read_text())["messages"][1]["content"] == "Once"
    for line, words in (
        (f"/load {tmp_path}/a.json", "[2 messages from"),
        ("/show", "assistant: Once"),
        ("/load", "/load: name a file, as in /load chat.json"),
        ("/load /nowhere/x", "No such file"),
        ("/dance", "/dance: there is no such command; /help lists them"),
        ("/help", "/system TEXT"),
    ):
        chat.type(line)
        assert words in await chat.until("> ")
    chat.type("Go on")
    await chat.until("> ")
    assert asked_messages(world)[-1] == [("user", "Hello"), ("assistant", "Once"), ("user", "Go on")]


async def test_line_that_ends_in_a_backslash_goes_on(api: ScriptedApi, terminal: Callable[..., Any]) -> None:
    world = api.script("Once")
    chat = await terminal(world)
    await chat.until("> ")
    chat.type("first \\")
    await chat.until("... ")
    chat.type("second")
    await chat.until("> ")
    assert asked_messages(world) == [[("user", "first \nsecond")]]


async def test_resumed_chat_goes_on_in_the_terminal(api: ScriptedApi, terminal: Callable[..., Any], state: Path) -> None:
    world = api.script(["Once", {"hold": True}, " upon"], "Twice")
    chat = await terminal(world)
    await chat.until("> ")
    chat.type("Hello")
    await chat.until("Once")
    chat.process.kill()
    await chat.process.wait()
    world.release()
    again = await terminal(world, "--resume")
    assert "Once upon" in await again.until("> ")
    again.type("More")
    await again.until("Twice")
    assert asked_messages(world)[1] == [("user", "Hello"), ("assistant", "Once upon"), ("user", "More")]


async def test_prompt_stands_on_stderr_where_stdout_is_a_file(api: ScriptedApi, tmp_path: Path) -> None:
    world = api.script("Once")
    master, slave = pty.openpty()
    with (tmp_path / "out").open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command(world), stdin=slave, stdout=out, stderr=asyncio.subprocess.PIPE, env=environment(), start_new_session=True
        )
    os.close(slave)
    os.write(master, b"Hello\n/quit\n")
    async with asyncio.timeout(DEADLINE_S):
        _, err = await process.communicate()
    os.close(master)
    assert ((tmp_path / "out").read_text(), err.decode().count("> ")) == ("Once\n", 2)
