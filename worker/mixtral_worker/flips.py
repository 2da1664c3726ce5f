"""`torchrun worker flips`: how often a token changes because it was computed in another batch shape.

Takes the worker's own flags; --max_batch_size sequences (32) of --max_seq_len tokens (128), which the model draws for itself from --seed.
Every position is then computed in each of SHAPES, and its best and its drawn token compared with those of a chat that decodes alone.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mixtral_worker import ranks, startup
from mixtral_worker.blocks import BLOCK_SIZE
from mixtral_worker.engine import Engine
from mixtral_worker.loading import divide_memory
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from mixtral_worker.sampling import sample
from mixtral_worker.settings import Settings

# N sequences of T tokens each.

SEQUENCES, TOKENS = 32, 128
TABLE_WIDTH = 110
DRAWN = Sampling(0.8)


@dataclass(frozen=True)
class Shape:
    """So many sequences feed so many tokens each in a step."""

    sequences: int
    tokens: int

    def __str__(self) -> str:
        chats = "1 chat" if self.sequences == 1 else f"{self.sequences} chats"
        return f"{chats}, {'1 token' if self.tokens == 1 else f'{self.tokens} tokens'} each"


ALONE = Shape(1, 1)
SHAPES = (Shape(2, 1), Shape(8, 1), Shape(32, 1), Shape(1, 7), Shape(1, 64), Shape(1, 512))


@dataclass(frozen=True)
class Outcome:
    """What one shape gave at every position."""

    best: Tensor  # [N, T] ids
    drawn: Tensor  # [N, T] ids
    score: Tensor  # [N, T] of the best


def run(settings: Settings) -> int:
    """Measure as this rank; rank 0 alone shows. Returns the exit code. Raises one of startup.REFUSALS."""
    config = startup.read_config(settings)
    config.require_ranks(settings.tp_size, settings.ep_size)
    count, tokens = settings.max_batch_size or SEQUENCES, min(settings.max_seq_len or TOKENS, config.max_seq_len)
    with redirect_stdout(io.StringIO()), ranks.join(settings.device) as here:  # fairscale prints, and stdout is the result's
        name, dtype = startup.checkpoint_name(settings.ckpt_dir), startup.dtype_of(settings.dtype, here.device)
        divide_memory(name, config, dtype, here, tokens, count)
        engine = Engine.load(
            settings.ckpt_dir,
            config=config,
            ep_size=settings.ep_size,
            dtype=dtype,
            device=here.device,
            max_slots=count,
            max_seq_len=tokens,
        )
        sequences = _draw(engine, count, tokens, settings.seed or 0)
        alone = measure(engine, sequences, ALONE)
        table = Table(
            "computed in steps of", "positions", "best differs", "drawn differs", "best score differs by at most", box=SIMPLE_HEAD
        )
        for shape in (shape for shape in SHAPES if shape.sequences <= count):
            _add(table, shape, alone, measure(engine, sequences, shape))
    if here.is_leader:
        console = Console(width=TABLE_WIDTH)
        title = f"{name} in {str(dtype).removeprefix('torch.')}, ranks: {here.world}; compared with steps of {ALONE}"
        console.print(title, highlight=False)
        console.print(table)
    return 0


def measure(engine: Engine, sequences: list[list[int]], shape: Shape) -> Outcome:
    best, drawn, score = (torch.zeros(len(sequences), len(sequences[0]), dtype=kind) for kind in (torch.int64, torch.int64, torch.float32))
    for slots, start, end in _steps(sequences, shape):
        rows = tuple(_row(engine, slot, sequences[slot][start:end], start) for slot in slots)
        logits = engine.logits(StepPlan(Kind.STEP, 0, rows), last=[end - start] * len(rows))[:, : engine.vocab_size].float()
        settings = [replace(DRAWN, seed=slot) for slot in slots for _ in range(start, end)]
        places = slice(slots.start, slots.stop), slice(start, end)
        values, ids = logits.max(-1)
        best[places], score[places] = ids.view(len(rows), -1).cpu(), values.view(len(rows), -1).cpu()
        drawn[places] = sample(logits, settings, [*range(start + 1, end + 1)] * len(rows)).view(len(rows), -1)
    return Outcome(best, drawn, score)


def _steps(sequences: list[list[int]], shape: Shape) -> Iterator[tuple[range, int, int]]:
    """Which sequences feed which of their tokens together."""
    tokens = len(sequences[0])
    for first in range(0, len(sequences), shape.sequences):
        for start in range(0, tokens, shape.tokens):
            yield range(first, min(first + shape.sequences, len(sequences))), start, min(start + shape.tokens, tokens)


def _row(engine: Engine, slot: int, tokens: list[int], start: int) -> Row:
    each = -(-engine.max_seq_len // BLOCK_SIZE)
    blocks = tuple(range(slot * each, slot * each - (-(start + len(tokens)) // BLOCK_SIZE)))
    return Row(slot=slot, start=start, tokens=tuple(tokens), blocks=blocks, samples=True)


def _draw(engine: Engine, count: int, tokens: int, seed: int) -> list[list[int]]:
    """Sequences as the model writes them, each from another first token; the same on every rank."""
    rng = random.Random(seed)
    sequences = [[rng.randrange(engine.vocab_size)] for _ in range(count)]
    for at in range(tokens - 1):
        rows = tuple(_row(engine, slot, sequence[-1:], at) for slot, sequence in enumerate(sequences))
        logits = engine.logits(StepPlan(Kind.STEP, 0, rows))[:, : engine.vocab_size]
        ids = sample(logits, [replace(DRAWN, seed=seed + slot) for slot in range(count)], [at + 1] * count)
        for sequence, next_id in zip(sequences, ids.tolist(), strict=True):
            sequence.append(next_id)
    return sequences


def _add(table: Table, shape: Shape, alone: Outcome, other: Outcome) -> None:
    differ = ((alone.best != other.best), (alone.drawn != other.drawn))
    shares = (f"{int(each.sum()):,} ({each.float().mean().item():.3%})" for each in differ)
    table.add_row(str(shape), f"{alone.best.numel():,}", *shares, f"{(alone.score - other.score).abs().max().item():.2g}")
