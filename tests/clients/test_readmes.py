"""The READMEs' examples run as they stand; only the address is exchanged for that of a scripted API."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_client import MixtralClient
from support.node import find_node
from support.scripted_api import KEY, Fault, ScriptedApi, World

CLIENTS = Path(__file__).resolve().parents[2] / "clients"
ADDRESS = "http://127.0.0.1:7777"
DEADLINE_S = 30.0


def examples(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (CLIENTS / page).read_text(), re.M | re.S)


PYTHON = examples("python/README.md", "python")
SHELL = examples("python/README.md", "sh")
JAVASCRIPT = examples("javascript/README.md", "js")


def test_every_fenced_example_is_of_a_language_that_runs_here() -> None:
    assert (len(PYTHON), len(SHELL), len(JAVASCRIPT)) == (6, 2, 3)
    for page in ("python/README.md", "javascript/README.md"):
        assert set(re.findall(r"^```(\w+)", (CLIENTS / page).read_text(), re.M)) <= {"python", "sh", "js"}


async def output_of(*command: str, **environment: str) -> str:
    pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        **pipes,
        env={**os.environ, "MIXTRAL_CLIENT_KEY": KEY, **environment},
        cwd=CLIENTS.parent,
    )
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_first_python_example_is_a_whole_program(api: ScriptedApi) -> None:
    world = api.script()
    out = await output_of(sys.executable, "-c", PYTHON[0].replace(ADDRESS, world.url), PYTHONPATH=str(CLIENTS / "python"))
    assert out == "Once upon a time stop 7\nOnce upon a time"


@pytest.mark.parametrize("number", range(1, len(PYTHON)))
async def test_further_python_examples_run_inside_the_first(
    api: ScriptedApi, connect: Callable[..., MixtralClient], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setenv("MIXTRAL_CLIENT_KEY", KEY)
    world = api.script()
    printed = await run_inside(PYTHON[number].replace(ADDRESS, world.url), {"client": connect(world.url), "asyncio": asyncio})
    cancelled = {2: ["cancelled"], 3: ["cancelled"]}  # the stream left by break, and the job cancelled by name
    assert list(world.history()["jobs"].values()) == cancelled.get(number, ["streaming"] * len(world.jobs))
    words = {3: "mixtral_chat.0-1 1\nevent='queued'", 5: "['mixtral_chat']\n"}
    assert printed.startswith(words.get(number, ""))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({}, ""),
        ({"faults": [Fault(on="POST", status=429, headers={"Retry-After": "60"})]}, "full; try again in 60.0 s\n"),
        ({"end": {"event": "error", "error": {"message": "no", "type": "x", "code": "y"}}}, "job mixtral_chat.0-1 failed: no\n"),
        ({"faults": [Fault(on="POST", status=500, code="z", message="no")]}, "z 500 no req-7\n"),
    ],
    ids=["none", "full", "failed", "other"],
)
async def test_python_example_of_errors_tells_each(
    api: ScriptedApi, connect: Callable[..., MixtralClient], script: dict[str, Any], words: str
) -> None:
    example = next(example for example in PYTHON if "except" in example)
    assert await run_inside(example, {"client": connect(api.script(**script).url)}) == words


async def run_inside(source: str, names: dict[str, Any]) -> str:
    code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        outcome = eval(code, names)
        if inspect.isawaitable(outcome):
            await outcome
    return printed.getvalue()


@pytest.mark.parametrize("example", SHELL, ids=["chat", "pipes"])
async def test_shell_examples_run(api: ScriptedApi, tmp_path: Path, example: str) -> None:
    world = api.script()
    chat = tmp_path / "mixtral-chat"
    chat.write_text(f'#!/bin/sh\nPYTHONPATH={CLIENTS / "python"} exec {sys.executable} -m mixtral_client.cli "$@"\n')
    chat.chmod(0o755)
    # Without a terminal the bare chat waits for a message: it gets one.
    script = "set -e\n" + re.sub(r"^mixtral-chat", "echo Hello | mixtral-chat", example.replace(ADDRESS, world.url), flags=re.M)
    out = await output_of("sh", "-c", script, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "Once upon a time\n" in out
    assert len(world.jobs) == len(example.splitlines())
    if "--json" in example:
        assert '"event":"done"' in out


@pytest.mark.parametrize("number", range(len(JAVASCRIPT)))
async def test_javascript_examples_run(api: ScriptedApi, tmp_path: Path, number: int) -> None:
    world = api.script()
    module = (CLIENTS / "javascript/mixtral-client.js").as_uri()
    source = re.sub(r'from "[^"]+"', f'from "{module}"', JAVASCRIPT[number].replace(ADDRESS, world.url))
    file = tmp_path / "example.mjs"
    file.write_text(page_of(world) + source if "/client/" in JAVASCRIPT[number] else source)
    out = await output_of(str(find_node()), str(file))
    assert (
        out
        == [
            "Once upon a time\nstop, 7 tokens\n",
            "3  a\n4  time\n",
            "1 Once upon a time\n[ 'mixtral_chat' ]\n",
        ][number]
    )


def page_of(world: World) -> str:
    """What a browser adds for a page of that server: its address before a path, and the visitor's right to ask."""
    return f"""
globalThis.location = new URL("{world.url}/");
const plainFetch = globalThis.fetch;
const Authorization = "Bearer {KEY}";
globalThis.fetch = (path, init) => plainFetch("{world.url}" + path, {{ ...init, headers: {{ ...init.headers, Authorization }} }});
"""
