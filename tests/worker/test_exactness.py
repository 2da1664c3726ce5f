"""The exactness matrix: whatever runs beside a job, however it is cut, cached, preempted or moved, on any ranks, its tokens are the same.

In float32, two ways of computing one position differ by rounding. A first difference is allowed only where the two best scores lie within
TIE of each other (of drawn tokens: the best two after the noise), at most once in 20,000 tokens; the matrix counts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch

from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.engine import Engine
from support import exactness
from support.exactness import JOBS, ON_LAYOUTS, WAYS, Answers, Job, Way
from support.small_mixtral import as_transformers, write_checkpoint
from support.torchrun import ROOT

TIE = 1e-4
TOKENS_PER_DIFFERENCE = 20_000
TORCHRUN_DEADLINE_S = 180
MODELS = ("demo", "eight_heads", "windowed", "dense")
LAYOUTS = [  # ranks, model, ep_size
    (2, "demo", 1),
    (2, "demo", 2),
    (2, "windowed", 1),
    (2, "dense", 1),
    (4, "demo", 2),
    (8, "eight_heads", 1),
    (8, "eight_heads", 2),
]
KINDS = {"greedy": False, "drawn": True}


@dataclass
class Model:
    """A checkpoint, what runs it here, and each job's answer when it runs alone."""

    name: str
    checkpoint: Path
    engine: Engine
    alone: Answers

    @property
    def jobs(self) -> list[Job]:
        return exactness.jobs(self.engine.vocab_size)


@dataclass
class Matrix:
    rows: list[tuple[str, int, int, int]] = field(default_factory=list)  # way, jobs, tokens, differences excused

    def compare(self, way: str, model: Model, found: Answers, kinds: Iterable[str] = KINDS) -> None:
        """Two rows: the greedy jobs' and the drawn ones'."""
        assert [len(answer) for answer in found] == [job.max_tokens for job in model.jobs]
        for kind in kinds:
            compared = [
                (job, one, other)
                for job, one, other in zip(model.jobs, model.alone, found, strict=True)
                if (job.sampling.temperature > 0) == KINDS[kind]
            ]
            excused = sum(self._differs(f"{model.name}, {kind}: {way}", model, *each) for each in compared)
            self.rows.append((f"{model.name}, {kind}: {way}", len(compared), sum(len(one) for _, one, _ in compared), excused))

    def _differs(self, way: str, model: Model, job: Job, expected: list[int], found: list[int]) -> bool:
        offset = next((i for i, pair in enumerate(zip(expected, found, strict=True), 1) if pair[0] != pair[1]), None)
        if offset is None:
            return False
        won_by = exactness.margin(model.engine, job, expected, offset)
        assert won_by < TIE, f"{way}: {job.job_id} has another token at offset {offset}, where the best won by {won_by}"
        print(f"{way}: {job.job_id} has another token at offset {offset}, where the best won by {won_by:.1e}")
        return True

    def __str__(self) -> str:
        rows = [f"{way:<90}{jobs:>6}{tokens:>9,}{excused:>13}" for way, jobs, tokens, excused in self.rows]
        return "\n".join([f"{'way of running':<90}{'jobs':>6}{'tokens':>9}{'differences':>13}", *rows])


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return Matrix()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root, made = tmp_path_factory.mktemp("models"), {}
    for name in MODELS:
        folder = DEMO_CKPT_DIR if name == "demo" else write_checkpoint(root / name, name)
        engine = exactness.load(folder)
        asked = exactness.jobs(engine.vocab_size)
        alone = [exactness.run(Way("alone", slots=1), [job], engine.num_blocks, engine.step)[0][0] for job in asked]
        made[name] = Model(name, folder, engine, alone)
    return made


@pytest.fixture(scope="module")
def of_torchrun(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Answers]]:
    """Number of ranks → what a real torchrun answered on each of the layouts with so many; all of them in one run."""

    @cache
    def run(count: int) -> dict[str, Answers]:
        out = tmp_path_factory.mktemp("layouts") / "answers.pt"
        layouts = [f"{models[model].checkpoint}:{ep_size}" for ranks, model, ep_size in LAYOUTS if ranks == count]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", exactness.__name__]
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'worker'}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        command += [str(out), *layouts]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TORCHRUN_DEADLINE_S)
        assert ended.returncode == 0, ended.stderr
        answers: dict[str, Answers] = torch.load(out)
        return answers

    return run


def test_jobs_answer_differently_so_that_a_mistake_would_show(models: dict[str, Model]) -> None:
    for model in models.values():
        assert len({len(job.prompt_ids) for job in model.jobs}) > JOBS / 2
        assert len({tuple(answer) for answer in model.alone}) > 0.9 * len(model.jobs)
        assert sum(len(set(answer)) for answer in model.alone) > 8 * len(model.jobs)


@pytest.mark.parametrize("model_name", MODELS)
def test_greedy_tokens_are_those_of_transformers_generate(
    model_name: str, models: dict[str, Model], matrix: Matrix, tmp_path: Path
) -> None:
    model = models[model_name]
    theirs = as_transformers(model.checkpoint, tmp_path)
    theirs.generation_config.eos_token_id = None
    found = list(model.alone)
    for number, job in enumerate(model.jobs):
        if job.sampling.temperature == 0:
            prompt = torch.tensor([job.prompt_ids])
            limits = {"max_new_tokens": job.max_tokens, "do_sample": False, "pad_token_id": 0}
            ids = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **limits)
            found[number] = ids[0, len(job.prompt_ids) :].tolist()
    matrix.compare("transformers' generate", model, found, ["greedy"])


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_tokens_are_those_of_the_job_alone(way: Way, model_name: str, models: dict[str, Model], matrix: Matrix) -> None:
    model = models[model_name]
    engine = exactness.load(model.checkpoint) if way.share_elsewhere else model.engine  # another worker
    found, scheduler = exactness.run(way, model.jobs, engine.num_blocks, engine.step, model.alone)
    assert (scheduler.preemptions > 0) == way.preempts
    assert scheduler.reused_tokens > (1_000 if way.is_known else 0)
    matrix.compare(way.name, model, found)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("way", [WAYS[0], WAYS[-1]], ids=lambda way: way.name)
def test_tokens_of_the_models_own_modules_are_those_of_the_compiled_pass(
    way: Way, model_name: str, models: dict[str, Model], matrix: Matrix
) -> None:
    model = models[model_name]
    engine = exactness.load_without_compiled_pass(model.checkpoint)
    found, _ = exactness.run(way, model.jobs, engine.num_blocks, engine.step, model.alone)
    matrix.compare(f"no compiled pass, {way.name}", model, found)


@pytest.mark.timeout(1.5 * TORCHRUN_DEADLINE_S)
@pytest.mark.parametrize(("ranks", "model_name", "ep_size"), LAYOUTS, ids=str)
def test_tokens_on_every_layout_are_those_of_one_rank(
    ranks: int, model_name: str, ep_size: int, models: dict[str, Model], of_torchrun: Callable[[int], dict[str, Answers]], matrix: Matrix
) -> None:
    model = models[model_name]
    found = of_torchrun(ranks)[f"{model.checkpoint}:{ep_size}"]
    matrix.compare(f"tp {ranks}, ep {ep_size}: {ON_LAYOUTS.name}", model, found)


def test_at_most_one_token_in_20_000_is_a_tie_that_fell_otherwise(matrix: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, excused = (sum(row[column] for row in matrix.rows) for column in (2, 3))
    with capsys.disabled():
        print(f"\n{matrix}\n{len(matrix.rows)} rows, {tokens:,} tokens, {excused} differences excused")
    assert excused * TOKENS_PER_DIFFERENCE <= tokens
