"""Memory that does not hold one chat of a batch: real ranks under torchrun, whose memory the kernel limits while they run."""

from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path

import pytest

from support.fake_server import KEY, Job, serving
from support.tiny_worker import TinyWorker, reference, write_tiny_worker
from support.torchrun import Torchrun, torchrun

CONTEXT = 16_000
LONG = [1, *[300] * 15_000]
HEADROOM_BYTES = 8 * 2**20
"""The chunk at the end of a long prompt wants three times this for its mask alone, on each rank alike; short chats want none of it."""

ENVIRONMENT = {
    "MIXTRAL_WORKER_KEY": KEY,
    "MALLOC_MMAP_THRESHOLD_": "65536",  # what a tensor frees is free, not kept for the next
    "CXX": "/no/compiler",  # torch's own attention, since the compiled pass wants no mask
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_worker(tmp_path_factory.mktemp("tiny"))
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"max_seq_len": CONTEXT}))
    return folder


def limit_memory(pid: int) -> None:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM_BYTES, resource.RLIM_INFINITY))


def two_ranks(tiny: Path, url: str) -> list[str]:
    size = ["--max_batch_size", "4", "--max_seq_len", str(CONTEXT)]
    return ["--nproc_per_node", "2", "worker", "--ckpt_dir", str(tiny), "--api_server", url, *size]


async def test_chat_that_memory_does_not_hold_fails_alone_on_all_ranks_and_the_others_go_on(tiny: Path) -> None:
    async with serving() as server:
        with torchrun(two_ranks(tiny, server.url), environment=ENVIRONMENT) as worker:
            await server.finished(await server.put(prompt=LONG, max_tokens=1))  # kept: who goes on with it begins at its end
            beside = [await server.put(prompt="Once upon a time", max_tokens=200, seed=seed) for seed in range(2)]
            await server.until(lambda: all(len(job.ids) > 5 for job in beside))
            for rank in (0, 1):
                limit_memory(worker.rank(rank))
            glutton = await server.put(prompt=[*LONG, *[301] * 400], max_tokens=5)
            await server.finished(glutton)
            assert glutton.error is not None
            assert glutton.error.code == "out_of_memory"
            after = await server.put(prompt="There was a cat", max_tokens=20, seed=9)
            await server.finished(*beside, after)
            assert_as_one_rank_alone(tiny, [*beside, after])
            assert len(server.logins) == 1, "no rank ended"


async def test_chat_that_only_one_ranks_memory_does_not_hold_ends_all_ranks_and_none_hangs(tiny: Path) -> None:
    async with serving(lease_s=2.0) as server:
        with torchrun(two_ranks(tiny, server.url), environment=ENVIRONMENT) as worker:
            await server.finished(await server.put(prompt=LONG, max_tokens=1))
            limit_memory(worker.rank(1))
            await server.put(prompt=[*LONG, *[301] * 400], max_tokens=5)
            assert await ended(worker) != 0


async def ended(worker: Torchrun) -> int:
    return await asyncio.to_thread(worker.wait)


def assert_as_one_rank_alone(tiny: Path, jobs: list[Job]) -> None:
    alone = TinyWorker.load(tiny)
    assert [(job.ids, job.text) for job in jobs] == [(e.ids, e.text) for e in (reference(alone, job.spec) for job in jobs)]
