"""The benchmark against the real thing: a server with a worker and the demo model, over each of its wires."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mixtral_benchmark.house import House

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 90
LOAD = ("--total_requests", "4", "--concurrent_requests", "2", "--max_tokens", "24")


async def measured(house: House, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmark", "-as", house.target.url, "-k", house.key, *LOAD, *flags]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(LIMIT_S):
        stdout, stderr = await process.communicate()
    assert process.returncode == 0, stdout.decode() + stderr.decode()
    read: dict[str, Any] = json.loads(stdout.decode().rstrip("\n").splitlines()[-1])
    return read


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house() -> AsyncIterator[House]:
    async with House("mixtral_chat") as house:
        yield house


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("wire", [["--api", "openai"], ["--verify"], ["--api", "aime"]], ids=["openai", "native", "aime"])
async def test_every_wire_of_our_server_is_measured_with_exact_counts(house: House, wire: list[str]) -> None:
    outcome = await measured(house, *wire)
    assert (outcome["completed"], outcome["failed"]) == (4, 0)
    assert 4 * 2 <= outcome["total_output_tokens"] <= 4 * 24
    assert outcome["mean_ttft_ms"] is not None


@pytest.mark.asyncio(loop_scope="module")
async def test_synthetic_prompts_and_forced_lengths_are_exact_on_our_server(house: House) -> None:
    outcome = await measured(house, "--input_tokens", "300", "--shared_prefix_tokens", "200", "--ignore_eos")
    assert outcome["total_output_tokens"] == 4 * 24
    assert outcome["total_input_tokens"] == pytest.approx(4 * 300, rel=0.02)


@pytest.mark.asyncio(loop_scope="module")
async def test_chats_of_several_turns_go_on_from_what_the_model_said(house: House) -> None:
    outcome = await measured(house, "--turns", "3", "--api", "native")
    assert (outcome["completed"], outcome["unsent"]) == (12, 0)
