"""The whole worker as a user starts it: torchrun, its ranks, their signals and their ends. Real processes, a real HTTP server."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from support.fake_server import KEY, serving
from support.tiny_worker import TinyWorker, reference, write_tiny_worker
from support.torchrun import HANG_S, ROOT, torchrun

STORY = [("user", "Tell me a story about a cat and a dog.")]
ENVIRONMENT = {"MIXTRAL_WORKER_KEY": KEY}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_worker(tmp_path_factory.mktemp("tiny"))


async def test_torchrun_worker_from_the_repository_serves_the_demo_model_and_drains_on_sigterm() -> None:
    async with serving() as server:
        with torchrun(["--nproc_per_node", "1", "worker", "--api_server", server.url], environment=ENVIRONMENT) as worker:
            await asyncio.to_thread(worker.log_line, "event=ready")
            first = await server.put(messages=[("user", "Tell a long story: Once upon a time")], max_tokens=40)
            await server.finished(first)
            assert first.finish in ("stop", "length")
            assert len(first.text.split()) > 10
            running = await server.put(messages=[("user", "Tell a long story: Once upon a time")], max_tokens=60, seed=2)
            await server.until(lambda: bool(running.ids))
            worker.process.send_signal(signal.SIGTERM)
            await server.finished(running)
            await asyncio.to_thread(worker.log_line, "event=stopped handed_back=0")
            await asyncio.to_thread(worker.wait)
        assert server.logouts == ["session-1"]


async def test_two_ranks_by_absolute_path_answer_as_one_rank_does_and_all_end_zero_when_rank_0_is_told_to_stop(
    tiny: Path, tmp_path: Path
) -> None:
    async with serving() as server:
        arguments = ["--nproc_per_node", "2", f"{ROOT / 'worker'}/", "--ckpt_dir", str(tiny), "--api_server", server.url]
        with torchrun(arguments, cwd=tmp_path, environment=ENVIRONMENT) as worker:
            jobs = [await server.put(messages=STORY, max_tokens=30, temperature=0.8 * (seed > 0), seed=seed) for seed in range(4)]
            await server.finished(*jobs)
            alone = TinyWorker.load(tiny)
            assert [(job.ids, job.text) for job in jobs] == [(e.ids, e.text) for e in (reference(alone, job.spec) for job in jobs)]
            os.kill(worker.rank(1), signal.SIGTERM)  # a follower waits for rank 0
            after = await server.put(messages=STORY, max_tokens=5)
            await server.finished(after)
            os.kill(worker.rank(0), signal.SIGTERM)
            assert await asyncio.to_thread(worker.wait) == 0
            assert worker.rest_of_log().count("event=starting") == 1, "rank 0 alone speaks"
        assert server.logouts == ["session-1"]


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_rank_that_is_killed_ends_the_other_and_its_job_lapses_back_to_the_queue(tiny: Path, victim: int) -> None:
    async with serving(lease_s=2.0) as server:
        arguments = ["--nproc_per_node", "2", "worker", "--ckpt_dir", str(tiny), "--api_server", server.url]
        with torchrun(arguments, environment=ENVIRONMENT) as worker:
            job = await server.put(messages=STORY, max_tokens=10_000, temperature=0)
            await server.until(lambda: len(job.ids) > 2)
            other = worker.rank(1 - victim)
            os.kill(worker.rank(victim), signal.SIGKILL)
            assert await asyncio.to_thread(worker.wait) != 0
            with pytest.raises(ProcessLookupError):
                os.kill(other, 0)
        assert server.logouts == [], "a crash is no goodbye: the server must be able to count it"
        await server.lapse()
        assert server.waiting == [job]
        assert job.ids == reference(TinyWorker.load(tiny), job.spec).ids[: len(job.ids)]


async def test_ranks_whose_torchrun_was_killed_finish_their_chats_and_end_by_themselves(tiny: Path) -> None:
    async with serving() as server:
        arguments = ["--nproc_per_node", "2", "worker", "--ckpt_dir", str(tiny), "--api_server", server.url]
        with torchrun(arguments, environment=ENVIRONMENT) as worker:
            running = await server.put(messages=STORY, max_tokens=200)
            await server.until(lambda: bool(running.ids))
            ranks = [worker.rank(0), worker.rank(1)]
            worker.process.kill()
            await server.finished(running)
            async with asyncio.timeout(HANG_S):
                while any(map(is_alive, ranks)):  # noqa: ASYNC110 - nobody is told of the end of another's child
                    await asyncio.sleep(0.05)
        assert server.logouts == ["session-1"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_setting_that_cannot_work_is_one_sentence_from_rank_0_and_a_code_that_is_not_zero() -> None:
    with torchrun(["--nproc_per_node", "2", "worker", "--api_server", "http://127.0.0.1:1"]) as worker:
        assert worker.wait() != 0
        said = [line for line in worker.rest_of_log().splitlines() if line.startswith("mixtral-worker:")]
    assert len(said) == 1
    assert "MIXTRAL_WORKER_KEY" in said[0]
