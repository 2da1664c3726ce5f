"""The READMEs' examples run as they stand against a real server; only its address is exchanged. Their types are checked as a user's are."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
import venv
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral_client import MixtralClient, Timeouts
from mixtral_client.testing import Fault
from support.live_server import LiveServer
from support.node import find_node
from support.redis import RedisProcess, redis_binary
from support.scripted_api import ScriptedApi
from support.scripted_worker import ScriptedWorker, answer_to, text_of

CLIENTS = Path(__file__).resolve().parents[2] / "clients"
ADDRESS = "http://127.0.0.1:7777"
DEADLINE_S = 60.0
STORY = "Tell a long story: Once upon a time"


def examples(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (CLIENTS / page).read_text(), re.M | re.S)


PYTHON = examples("python/README.md", "python")
PROGRAMS = [example for example in PYTHON if "asyncio.run" in example or "SyncClient(" in example]
FRAGMENTS = [example for example in PYTHON if example not in PROGRAMS]
SHELL = examples("python/README.md", "sh")
JAVASCRIPT = examples("javascript/README.md", "js")


def test_every_fenced_example_is_of_a_language_that_runs_here() -> None:
    assert (len(PROGRAMS), len(FRAGMENTS), len(SHELL), len(JAVASCRIPT)) == (3, 5, 2, 5)
    for page in ("python/README.md", "javascript/README.md"):
        assert set(re.findall(r"^```(\w+)", (CLIENTS / page).read_text(), re.M)) <= {"python", "sh", "js"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("server")
    with RedisProcess(redis_binary("6.2"), "--appendonly", "no") as redis, LiveServer(folder, redis.url) as server:
        yield server


@pytest.fixture
async def worker(server: LiveServer) -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker(server.url, server.worker_key) as worker:
        yield worker


async def output_of(*command: str, cwd: Path = CLIENTS.parent, **environment: str) -> str:
    pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        **pipes,
        env={**os.environ, "PYTHONPATH": str(CLIENTS / "python"), **environment},
        cwd=cwd,
    )
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode() + out.decode()
    return out.decode()


# ------------------------------------------------------------------------------------------------ Python


@pytest.mark.parametrize(("number", "said"), [(0, f"{answer_to(STORY)} stop "), (1, f"{answer_to('Hello')}\n{answer_to('Count to ten')}")])
async def test_python_program_runs(server: LiveServer, worker: ScriptedWorker, number: int, said: str) -> None:
    out = await output_of(sys.executable, "-c", PROGRAMS[number].replace(ADDRESS, server.url), MIXTRAL_CLIENT_KEY=server.client_key)
    assert out.startswith(said)


async def test_python_test_of_a_users_program_passes(tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(PROGRAMS[2])
    assert "1 passed" in await output_of(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_example.py", cwd=tmp_path)


@pytest.mark.parametrize("number", range(len(FRAGMENTS)))
async def test_further_python_examples_run_inside_the_first(
    server: LiveServer, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setenv("MIXTRAL_CLIENT_KEY", server.client_key)
    async with MixtralClient(server.url) as client:
        printed = await run_inside(FRAGMENTS[number].replace(ADDRESS, server.url), {"client": client, "asyncio": asyncio})
    three = text_of("user: Count to a million", 3)
    words = [
        "",
        f"{three}\n",
        r"mixtral_chat\.0-\w+ 1\n(event='token' offset=\d+ .*\n)+event='done' finish='stop' .*\n",
        r"\['mixtral_chat'\]\nlength\n",
        "",
    ]
    assert re.match(words[number], printed), printed
    assert "offset=2 " not in printed, "a token that was read already"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({"faults": [Fault("submit", status=429, retry_after="60")]}, "full; try again in 60.0 s\n"),
        ({"script": [{"error": {"message": "no", "type": "x", "code": "y"}}]}, "job mixtral_chat.0-1 failed: no\n"),
        ({"faults": [Fault("submit", status=500, code="z", message="no")]}, "z 500 None no req-1\n"),
        ({"script": [{"hold": True}]}, "job mixtral_chat.0-1 took too long: total\n"),
    ],
    ids=["full", "failed", "other", "slow"],
)
async def test_python_example_of_errors_tells_each(
    api: ScriptedApi, connect: Callable[..., MixtralClient], script: dict[str, Any], words: str
) -> None:
    example = next(example for example in FRAGMENTS if "except" in example)
    world = api.script(script.pop("script", "Hello"), **script)
    assert await run_inside(example, {"client": connect(world.url, timeouts=Timeouts(total_s=2))}) == words


async def run_inside(source: str, names: dict[str, Any]) -> str:
    code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        outcome = eval(code, names)
        if inspect.isawaitable(outcome):
            await outcome
    return printed.getvalue()


def test_python_examples_satisfy_a_strict_type_checker_in_a_users_environment(tmp_path: Path) -> None:
    """The package stands in site-packages there, so that py.typed decides whether its types count."""
    venv.create(tmp_path / "env", symlinks=True)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    shutil.copytree(CLIENTS / "python/mixtral_client", site / "mixtral_client")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    for number, program in enumerate(PROGRAMS):
        (tmp_path / f"program_{number}.py").write_text(program)
    head = "import asyncio\nfrom mixtral_client import MixtralClient\n\n\nasync def example(client: MixtralClient) -> None:\n"
    for number, fragment in enumerate(FRAGMENTS):
        (tmp_path / f"fragment_{number}.py").write_text(head + textwrap.indent(fragment, "    "))
    wrong = "from mixtral_client import SyncClient\n\nSyncClient('http://x').chat('Hello', max_token=3)\n"
    (tmp_path / "wrong.py").write_text(wrong)
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        str(tmp_path / "env/bin/python"),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    said = subprocess.run([*mypy, "."], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100).stdout
    complaints = [line for line in said.splitlines() if ": error:" in line]
    assert [line.partition(":")[0] for line in complaints] == ["wrong.py"], said
    assert "max_token" in complaints[0]


# ------------------------------------------------------------------------------------------------ shell


@pytest.mark.parametrize("example", SHELL, ids=["chat", "pipes"])
async def test_shell_examples_run(server: LiveServer, worker: ScriptedWorker, tmp_path: Path, example: str) -> None:
    chat = tmp_path / "mixtral-chat"
    chat.write_text(f'#!/bin/sh\nexec {sys.executable} -m mixtral_client.cli "$@"\n')
    chat.chmod(0o755)
    (tmp_path / "README.md").write_text("The first line of many.\n")
    # Without a terminal the bare chat waits for a message: it gets one.
    script = "set -e\n" + re.sub(
        r"^mixtral-chat (?=--api_server)", "echo Hello | mixtral-chat ", example.replace(ADDRESS, server.url), flags=re.M
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    out = await output_of("sh", "-c", script, cwd=tmp_path, PATH=path, XDG_STATE_HOME=str(tmp_path), MIXTRAL_CLIENT_KEY=server.client_key)
    if "--json" not in example:
        assert out == answer_to("Hello") + "\n"
        return
    cat, summed, first, then, done = out.splitlines()
    assert cat + "\n" == first + "\n" == answer_to("Tell a story about a cat.") + "\n"
    assert summed == answer_to("Sum this up in one sentence:\n\nThe first line of many.")
    history = f"user: Tell a story about a cat.\nassistant: {answer_to('Tell a story about a cat.')}\nuser: And then?"
    assert then == text_of(history)
    assert done.startswith('{"event":"done","finish":"stop"')


# ------------------------------------------------------------------------------------------------ JavaScript


@pytest.mark.parametrize("number", range(len(JAVASCRIPT)))
async def test_javascript_examples_run(server: LiveServer, worker: ScriptedWorker, tmp_path: Path, number: int) -> None:
    source = JAVASCRIPT[number].replace(ADDRESS, server.url).replace('"/client/mixtral-client.js"', '"mixtral-client"')
    package = tmp_path / "node_modules/mixtral-client"
    package.parent.mkdir()
    package.symlink_to(CLIENTS / "javascript")
    file = tmp_path / "example.mjs"
    file.write_text(page_of(server) + source if "/client/" in JAVASCRIPT[number] else source)
    out = await output_of(str(find_node()), str(file), cwd=tmp_path, MIXTRAL_CLIENT_KEY=server.client_key)
    words = [
        rf"{re.escape(answer_to(STORY))}\nstop, \d+ tokens\n{re.escape(text_of('Once upon a time', 5))} length\n",
        rf"{re.escape(answer_to('Hello'))}\n",
        r"\d+ mixtral_chat\n\[ 'mixtral_chat' \]\n",
        r"length\n",
        "",
    ]
    assert re.fullmatch(words[number], out), out


def page_of(server: LiveServer) -> str:
    """What a browser adds for a page of that server: its address before a path, and the visitor's right to ask."""
    return f"""
globalThis.location = new URL("{server.url}/");
const plainFetch = globalThis.fetch;
const Authorization = "Bearer {server.client_key}";
globalThis.fetch = (path, init) => plainFetch("{server.url}" + path, {{ ...init, headers: {{ ...init.headers, Authorization }} }});
"""
