"""64 greedy jobs and 64 drawn ones of mixed length, the ways in which a worker may come to run them, and by how much a token won.

As a program for torchrun it runs them on some layouts, one after another; rank 0 saves what they answered.

torchrun --nproc_per_node 4 -m support.exactness OUT CHECKPOINT:EP_SIZE …
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixtral_worker import ranks
from mixtral_worker.blocks import BLOCK_SIZE, BlockPool
from mixtral_worker.engine import Engine
from mixtral_worker.plan import Kind, PlanCodec, Row, Sampling, StepPlan
from mixtral_worker.sampling import _scores
from mixtral_worker.scheduler import Scheduler
from mixtral_worker.scheduler import Sequence as Job

JOBS, SLOTS, MAX_SEQ_LEN = 64, 32, 448  # of each kind
SETTINGS = (Sampling(0.8), Sampling(1.0, top_k=20), Sampling(0.9, top_p=0.8), Sampling(1.3), Sampling(0.7, top_p=0.95, top_k=40))
Answers = list[list[int]]


@dataclass(frozen=True)
class Way:
    """How the jobs are run. The fields beside the name may be set together."""

    name: str
    slots: int = SLOTS
    chunk: int = 512
    joins_every: int = 0  # steps; 0: all are there at once
    blocks: int | None = None  # of the KV cache; None: room for all slots
    preempts: bool = False  # later jobs have a higher priority
    is_known: bool = False  # the same prompts ran before in this cache, with other answers
    share_elsewhere: float = 0.0  # so much of each answer another worker gave before it died


WAYS = (
    Way("batched"),
    Way("joining late", joins_every=2),
    Way("chunked at odd sizes", chunk=7, joins_every=1),
    Way("prefix-cached", is_known=True),
    Way("preempted and resumed", preempts=True, joins_every=1, slots=13),
    Way("moved mid-way", share_elsewhere=0.5, slots=13),
    Way("all of it together", slots=19, chunk=23, joins_every=2, blocks=120, preempts=True, is_known=True, share_elsewhere=0.3),
)
ON_LAYOUTS = Way("joining late, chunked, preempted, prefix-cached", slots=11, chunk=97, joins_every=1, preempts=True)


def jobs(vocab_size: int) -> list[Job]:
    """Prompts of 1 to 400 tokens, answers of 4 to 26. Every fourth prompt begins as the one before it; every other job is drawn."""
    rng, made = random.Random(5), list[Job]()
    for number in range(2 * JOBS):
        length = rng.choice((rng.randint(1, 20), rng.randint(15, 50), rng.randint(50, 130), rng.randint(130, 400)))
        prompt = [rng.randrange(vocab_size) for _ in range(length)]
        if number % 4 == 3:
            prompt = (made[-1].prompt_ids[:200] + prompt)[:400]
        sampling = replace(SETTINGS[number % len(SETTINGS)], seed=number) if number % 2 else Sampling(0)
        made.append(Job(f"job{number}", 1, prompt, rng.randint(4, 26), sampling))
    return made


def run(
    way: Way, asked: Sequence[Job], num_blocks: int, step: Callable[[StepPlan], list[int]], reference: Answers | None = None
) -> tuple[Answers, Scheduler]:
    """Answers to the jobs, in their order. reference is needed where a part of each comes from elsewhere."""
    scheduler = Scheduler(way.slots, BlockPool(way.blocks or num_blocks), MAX_SEQ_LEN, prefill_chunk=way.chunk)
    if way.is_known:
        _run([Job(f"before {job.job_id}", 1, job.prompt_ids, 2, job.sampling) for job in asked], scheduler, 0, step)
    taken = [int(way.share_elsewhere * job.max_tokens) for job in asked]
    begun = [answer[:count] for answer, count in zip(reference or [[] for _ in asked], taken, strict=True)]
    jobs = [Job(job.job_id, 2, job.prompt_ids, job.max_tokens, job.sampling, ids) for job, ids in zip(asked, begun, strict=True)]
    for number, job in enumerate(jobs if way.preempts else []):
        job.priority = -number // 16
    _run(jobs, scheduler, way.joins_every, step)
    return [job.produced_ids for job in jobs], scheduler


def _run(waiting: list[Job], scheduler: Scheduler, joins_every: int, step: Callable[[StepPlan], list[int]]) -> None:
    queue, first = list(waiting), scheduler.step
    while queue or scheduler.running or scheduler.waiting:
        come = len(waiting) if not joins_every else (scheduler.step - first) // joins_every + 1
        while queue and (len(waiting) - len(queue) < come or not (scheduler.running or scheduler.waiting)):
            scheduler.admit(queue.pop(0))
        plan = scheduler.plan_step()
        assert plan is not None
        scheduler.record(plan, step(plan))


def load(checkpoint: Path, ep_size: int = 1) -> Engine:
    return Engine.load(checkpoint, ep_size=ep_size, max_slots=SLOTS, max_seq_len=MAX_SEQ_LEN)


def load_without_compiled_pass(checkpoint: Path) -> Engine:
    """The model's own modules compute every step, as they do on GPUs and where no compiler is found."""
    engine = load(checkpoint)
    engine.fast = None
    return engine


def margin(engine: Engine, job: Job, answer: Sequence[int], offset: int) -> float:
    """By how much the best score wins over the second at an offset of an answer, the whole context computed anew."""
    ids = (*job.prompt_ids, *answer[: offset - 1])
    blocks = tuple(range(-(-len(ids) // BLOCK_SIZE)))
    row = Row(slot=0, start=0, tokens=ids, blocks=blocks, samples=True, offset=offset, sampling=job.sampling)
    logits = engine.logits(StepPlan(Kind.STEP, 1, (row,))).float()
    best = (_scores(logits, [job.sampling], [offset]) if job.sampling.temperature else logits)[0].topk(2).values
    return float(best[0] - best[1])


def answers_on(checkpoint: Path, ep_size: int, here: ranks.Ranks) -> Answers:
    """All answers on these ranks; an empty list on others than rank 0."""
    engine, way, answers = load(checkpoint, ep_size), ON_LAYOUTS, []
    codec = PlanCodec(way.slots, MAX_SEQ_LEN, way.chunk + way.slots, BLOCK_SIZE)
    if here.is_leader:
        answers, scheduler = run(way, jobs(engine.vocab_size), engine.num_blocks, lambda plan: engine.step(here.share(plan, codec)))
        assert scheduler.preemptions, f"{way} preempts nothing"
        here.share(StepPlan(Kind.STOP), codec)
        return answers
    while (plan := here.share(None, codec)).kind is Kind.STEP:
        engine.step(plan)
    return []


def main(out: Path, layouts: Sequence[str]) -> None:
    with ranks.join("cpu") as here:
        torch.set_num_threads(1)
        found = {}
        for layout in layouts:
            checkpoint, _, ep_size = layout.rpartition(":")
            found[layout] = answers_on(Path(checkpoint), int(ep_size), here)
        if here.is_leader:
            torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
