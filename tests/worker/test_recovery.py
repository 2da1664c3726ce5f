"""A rank that dies ends its worker, which says who and when; torchrun starts it anew, and chats go on at the next token."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.fake_server import KEY, FakeServer, Job, serving
from support.tiny_worker import TinyWorker, reference, write_tiny_worker
from support.torchrun import torchrun

STORY = [("user", "Tell me a story about a cat and a dog.")]
ENVIRONMENT = {"MIXTRAL_WORKER_KEY": KEY}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_worker(tmp_path_factory.mktemp("tiny"))


async def put_some(server: FakeServer) -> list[Job]:
    """Long answers, greedy and drawn; each has begun."""
    jobs = [await server.put(messages=STORY, max_tokens=180, temperature=0.8 * (seed > 0), seed=seed) for seed in range(4)]
    await server.until(lambda: all(len(job.ids) > 2 for job in jobs))
    return jobs


def assert_answers_are_whole(jobs: list[Job], tiny: Path) -> None:
    alone = TinyWorker.load(tiny)
    for job in jobs:
        expected = reference(alone, job.spec)
        assert (job.ids, job.text, job.finish) == (expected.ids, expected.text, expected.finish)


@pytest.mark.parametrize("victim", [0, 2])
async def test_the_ranks_that_are_left_name_the_one_that_died_and_the_step_and_end(tiny: Path, victim: int) -> None:
    async with serving(lease_s=2.0) as server:
        arguments = ["--nproc_per_node", "4", "worker", "--ep_size", "2", "--ckpt_dir", str(tiny), "--api_server", server.url]
        with torchrun(arguments, environment=ENVIRONMENT) as worker:
            jobs = await put_some(server)
            os.kill(worker.rank(victim), signal.SIGKILL)
            assert await asyncio.to_thread(worker.wait) != 0
            log = worker.rest_of_log()
        said = [line for line in log.splitlines() if "event=rank_lost" in line]
        assert said
        assert all(f" lost={victim} step=" in line for line in said), said
        assert not any(" step=0 " in line for line in said)
        await server.lapse()
        assert sorted(job.id for job in server.waiting) == sorted(job.id for job in jobs if not job.is_over)


@pytest.mark.parametrize("victim", [0, 1])
async def test_torchrun_starts_the_ranks_anew_and_chats_go_on_at_the_next_token(tiny: Path, victim: int) -> None:
    async with serving(lease_s=2.0) as server:
        arguments = ["--nproc_per_node", "2", "--max-restarts", "1", "worker", "--ckpt_dir", str(tiny), "--api_server", server.url]
        with torchrun(arguments, environment=ENVIRONMENT) as worker:
            jobs = await put_some(server)
            os.kill(worker.rank(victim), signal.SIGKILL)
            await server.until(lambda: len(server.logins) == 2)
            await server.finished(*jobs)
            os.kill(worker.rank(0), signal.SIGTERM)
            assert await asyncio.to_thread(worker.wait) == 0
    assert_answers_are_whole(jobs, tiny)
    assert any(job.attempt == 2 for job in jobs)


class Hosts:
    """Two torchrun agents on this machine, as on two hosts of one rank each."""

    def __init__(self, stack: ExitStack, arguments: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "1", "--local-addr", "127.0.0.1"]
        meeting += ["--rdzv_backend", "c10d", "--rdzv_id", "mixtral", "--rdzv_endpoint", f"127.0.0.1:{port}"]
        self.agents = [stack.enter_context(torchrun([*meeting, *arguments], environment=ENVIRONMENT)) for _ in range(2)]

    def rank(self, number: int) -> int:
        return next(pid for pid in self._ranks(number))

    def _ranks(self, number: int) -> Iterator[int]:
        for agent in self.agents:
            try:
                yield agent.rank(number)
            except AssertionError:  # it has the other
                continue


async def test_two_hosts_serve_one_model_and_recover_when_a_rank_of_one_dies(tiny: Path) -> None:
    async with serving(lease_s=2.0) as server:
        with ExitStack() as stack:
            hosts = Hosts(stack, ["worker", "--ckpt_dir", str(tiny), "--api_server", server.url])
            before = [await server.put(messages=STORY, max_tokens=30, temperature=0.8 * (seed > 0), seed=seed) for seed in range(2)]
            await server.finished(*before)
            jobs = await put_some(server)
            os.kill(hosts.rank(1), signal.SIGKILL)
            await server.until(lambda: len(server.logins) == 2)
            await server.finished(*jobs)
            os.kill(hosts.rank(0), signal.SIGTERM)
            assert [await asyncio.to_thread(agent.wait) for agent in hosts.agents] == [0, 0]
    assert_answers_are_whole(before + jobs, tiny)
