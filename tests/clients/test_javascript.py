"""The JavaScript client's own tests, run by Node against the scripted API, so that one command runs all."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

from support.node import find_node
from support.scripted_api import ScriptedApi

FOLDER = Path(__file__).parent / "javascript"


async def test_javascript_tests_pass_under_node(api: ScriptedApi) -> None:
    files = sorted(str(path) for path in FOLDER.glob("*.test.mjs"))
    node = await asyncio.create_subprocess_exec(
        find_node(),
        *("--test", "--test-reporter=tap", *files),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "SCRIPTED_API": api.url},
    )
    try:
        output = (await node.communicate())[0].decode()
    finally:
        if node.returncode is None:
            node.kill()
            await node.wait()
    failures = "\n".join(re.findall(r"^ *not ok [\s\S]*?\.\.\.$", output, re.M))
    assert node.returncode == 0, failures or output
    counts = {name: int(count) for name, count in re.findall(r"^# (tests|pass|fail|skipped|todo) (\d+)$", output, re.M)}
    assert counts["pass"] == counts["tests"] > 100, output
