"""OpenAI's own client for Node: openai.test.mjs, run against a real server."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

from support.live_server import LiveServer
from support.node import find_node, install
from support.scripted_worker import ScriptedWorker, answer_to

FOLDER = Path(__file__).parent


async def test_openai_package_for_node_speaks_to_the_server(server: LiveServer, worker: ScriptedWorker) -> None:
    await asyncio.to_thread(install, FOLDER)
    told = {"SERVER": server.url, "KEY": server.client_key, "HELLO": answer_to("hello")}
    node = await asyncio.create_subprocess_exec(
        find_node(),
        *("--test", "--test-reporter=tap", str(FOLDER / "openai.test.mjs")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | told,
    )
    try:
        output = (await node.communicate())[0].decode()
    finally:
        if node.returncode is None:
            node.kill()
            await node.wait()
    assert node.returncode == 0, output
    counts = {name: int(count) for name, count in re.findall(r"^# (tests|pass) (\d+)$", output, re.M)}
    assert counts["pass"] == counts["tests"] == 8, output


def test_lock_file_names_no_registry() -> None:
    assert "://" not in (FOLDER / "package-lock.json").read_text()
