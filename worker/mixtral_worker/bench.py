"""`torchrun worker bench` at work: this engine and its peers answer the same chats in turns, and tables say how fast.

Decides what is measured, in which order, and what a figure means. First everyone answers the same chats and the answers are compared:
speed at another task is no speed. Who takes part, and how each is asked to do its best, is bench_peers.py's; the tables are
bench_report.py's.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from mixtral_worker import bench_report, export
from mixtral_worker.bench_cli import OURS, WITHOUT_PEERS, Asked
from mixtral_worker.bench_peers import GGUF, HUGGINGFACE, Answers, Chat
from mixtral_worker.bench_report import Check, Result
from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.settings import RANDOM
from mixtral_worker.startup import dtype_of
from mixtral_worker.tokenizer import Tokenizer

LARGE = f"{RANDOM}dim=1024,n_layers=12,n_heads=16,n_kv_heads=4,head_dim=64,hidden_dim=1792,vocab_size=32000"
TIE = 1e-4  # in float32 another token is right where the two best scores are nearer than this
LOAD_WITHIN_S, ANSWER_WITHIN_S = 300, 600


@dataclass(frozen=True)
class Shape:
    ckpt_dir: str
    dtype: str
    new_tokens: dict[int, int]  # batch size → tokens per chat
    longest_mixed: int


SHAPES = {
    "demo": Shape(str(DEMO_CKPT_DIR), "float32", {1: 128, 8: 64, 32: 40}, 160),
    "large": Shape(LARGE, "bfloat16", {1: 16, 8: 8, 32: 6}, 16),
    "8x7b-4": Shape(f"{RANDOM}8x7b,n_layers=4", "bfloat16", {1: 128, 8: 128, 32: 128}, 256),
    "8x7b": Shape(f"{RANDOM}8x7b", "bfloat16", {1: 128, 8: 128, 32: 128}, 256),
}


def run(asked: Asked) -> int:
    results = {name: _measure(SHAPES[name], asked, () if name in WITHOUT_PEERS else asked.peers) for name in asked.shapes}
    report = {
        "benchmark": "engine beside its peers",
        **bench_report.circumstances(asked),
        "shapes": {n: asdict(r) for n, r in results.items()},
    }
    for name, result in results.items():
        bench_report.show(name, result)
    line = json.dumps(report)
    if asked.json:
        asked.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


def _measure(shape: Shape, asked: Asked, peers: Sequence[str]) -> Result:
    result = Result(shape.dtype)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _export(shape, peers, folder)
        everyone = {name: stack.enter_context(Contestant(name, shape, asked, folder)) for name in (OURS, *peers)}
        _compare(everyone, shape, result, asked.seed)
        for turn in range(asked.rounds):
            names = list(everyone)
            order = names[turn % len(names) :] + names[: turn % len(names)]  # nobody is always first, nor always after the same
            for measure, chats in _tasks(shape, random.Random(f"{asked.seed} {turn}")).items():
                for name in order:
                    answers = everyone[name].answer(chats)
                    _require_whole(name, chats, answers)
                    result.figures.setdefault(measure, {}).setdefault(name, []).append(figure(measure, answers))
                    if answers.forward_s is not None:
                        result.outside.setdefault(measure, []).append(1 - answers.forward_s / answers.whole_s)
                    if answers.bandwidth_share:
                        result.bandwidth.setdefault(measure, []).append(answers.bandwidth_share)
            print(f"round {turn + 1} of {asked.rounds} done", file=sys.stderr, flush=True)
    return result


def _export(shape: Shape, peers: Sequence[str], folder: Path) -> None:
    """The very weights that this engine reads, in the peers' forms."""
    if not peers:
        return
    model = export.read_model(Path(shape.ckpt_dir), dtype_of(shape.dtype, torch.device("cpu")))
    if "llama.cpp" in peers:
        export.write_gguf(model, folder / GGUF, None)
    if any(peer.startswith("transformers") for peer in peers):
        export.write_huggingface(model, folder / HUGGINGFACE, Tokenizer(DEMO_CKPT_DIR / "tokenizer.model"), "instruct")


def figure(measure: str, answers: Answers) -> float:
    tokens, chats = sum(map(len, answers.ids)), len(answers.ids)
    if measure == "ttft":
        return answers.first_s[0]
    if measure == "mixed":
        return tokens / answers.whole_s
    return (tokens - chats) / (answers.whole_s - max(answers.first_s))  # what comes after everyone's first token


def _tasks(shape: Shape, rng: random.Random) -> dict[str, list[Chat]]:
    """The chats of one round. Other ones in each, so that nobody finds prompts in a cache."""
    vocab_size = ModelConfig.read(Path(shape.ckpt_dir)).vocab_size

    def chat(prompt_tokens: int, new_tokens: int) -> Chat:
        return Chat([rng.randrange(3, vocab_size) for _ in range(prompt_tokens)], new_tokens)

    tasks = {f"batch {size}": [chat(16, new_tokens) for _ in range(size)] for size, new_tokens in shape.new_tokens.items()}
    # Most chats are short and a few long, as users' are; one is as long as allowed, so that every round has the same longest.
    lengths = [max(4, min(shape.longest_mixed, round(shape.longest_mixed * rng.lognormvariate(-1.5, 0.8)))) for _ in range(31)]
    tasks["mixed"] = [chat(rng.randrange(8, 97), new_tokens) for new_tokens in (*lengths, shape.longest_mixed)]
    tasks["ttft"] = [chat(512, 1)]
    return tasks


def _compare(everyone: dict[str, Contestant], shape: Shape, result: Result, seed: int) -> None:
    """Everyone's greedy answers against this engine's; also the warm-up."""
    rng, vocab_size = random.Random(seed), ModelConfig.read(Path(shape.ckpt_dir)).vocab_size
    length = min(48, shape.longest_mixed)
    chats = [Chat([rng.randrange(3, vocab_size) for _ in range(size)], length) for size in (5, 16, 17, 33, 60, 90)]
    answers = {name: one.answer(chats) for name, one in everyone.items()}
    ours = answers.pop(OURS)
    for name, theirs in answers.items():
        _require_whole(name, chats, theirs)
        tokens, differences = 0, []
        for i, (mine, other) in enumerate(zip(ours.ids, theirs.ids, strict=True)):
            first = next((at for at, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
            tokens += len(mine) if first is None else first
            if first is not None:
                margin = everyone[OURS].margins(chats[i], mine)[first]
                differences.append({"chat": i, "offset": first + 1, "margin": margin})
        result.checks[name] = Check(tokens, differences)


def _require_whole(name: str, chats: Sequence[Chat], answers: Answers) -> None:
    for chat, ids in zip(chats, answers.ids, strict=True):
        if len(ids) != chat.new_tokens:
            raise RuntimeError(f"{name} gave {len(ids)} tokens of {chat.new_tokens}; its figures would mean nothing")


class Contestant:
    """One of those who are compared, in a process of its own."""

    def __init__(self, name: str, shape: Shape, asked: Asked, exported: Path) -> None:
        self._name = name
        root = str(Path(__file__).parents[1])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(asked.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        environment["PYTHONPATH"] = os.pathsep.join([root, *sys.path])
        # Ours runs as it serves, its threads asleep while they wait (cli.py); the others as they come.
        environment.pop("OMP_WAIT_POLICY", None)
        if name == OURS:
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        arguments = [name, shape.ckpt_dir, shape.dtype, asked.device, str(asked.threads), str(exported)]
        command = [sys.executable, "-m", "mixtral_worker.bench_peers", *arguments]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        began_s = time.monotonic()
        self._read()
        print(f"{name} is ready after {time.monotonic() - began_s:.1f} s", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        with self._process:  # closes its pipes and waits for its end
            pass

    def answer(self, chats: Sequence[Chat]) -> Answers:
        return Answers(**self._ask({"chats": [asdict(chat) for chat in chats]}))

    def margins(self, chat: Chat, ids: Sequence[int]) -> list[float]:
        """Of this engine alone."""
        margins: list[float] = self._ask({"chats": [asdict(chat)], "margins_of": list(ids)})
        return margins

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        row = self._process.stdout.readline()
        if not row:
            raise RuntimeError(f"{self._name} ended by itself with code {self._process.wait()}; what it said stands above")
        return json.loads(row)
