"""How well a model foretells a text: sliding windows through the engine that serves, and how sure the result is.

Decides which tokens are scored and how much text each of them sees, what is computed together in one step, and how intervals come about.
Every rank runs the same steps without a plan being sent, for all of them read the same text. What is shown is perplexity_report.py's.

A window of W tokens moves on by S; of each window those tokens are scored that no earlier one held (the convention of Hugging Face's guide
to perplexity), so every token but a document's first is scored once and sees at least W − S tokens, or all there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mixtral_worker.blocks import BLOCK_SIZE
from mixtral_worker.engine import Engine
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from mixtral_worker.prompt import Message, encode_chat, encode_text
from mixtral_worker.tokenizer import Tokenizer

STEP_TOKENS = 2048  # computed at once; bounds the logits to [2048, V]
RESAMPLES = 1000
CONFIDENCE = 0.95
ENOUGH_UNITS = 20  # fewer say too little about how much they differ: for few documents their windows are drawn, for few windows nothing

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Document:
    ids: tuple[int, ...]  # what stands ahead of the text (BOS, or a chat up to its answer), then the text
    ahead: int  # so many of the ids are not the text's, and are not scored
    text_bytes: int


@dataclass(frozen=True)
class Window:
    document: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]  # what follows the last len(targets) inputs
    text_bytes: int  # of the targets


@dataclass(frozen=True)
class Step:
    """Rows computed together; of each row so many last tokens are scored, for the window of this number."""

    rows: tuple[Row, ...]
    last: tuple[int, ...]
    windows: tuple[int, ...]


def documents(texts: Sequence[str], tokenizer: Tokenizer, as_answer_to: str | None, prompt_format: str) -> list[Document]:
    """Each text after BOS, or as a chat's answer."""
    found = []
    for text in texts:
        ids, ahead = encode_text(tokenizer, text), 1
        if as_answer_to is not None:
            asked = Message("user", as_answer_to)
            ids = encode_chat(tokenizer, [asked, Message("assistant", text)], prompt_format)
            ahead = len(encode_chat(tokenizer, [asked], prompt_format))
        found.append(Document(tuple(ids), ahead, len(text.encode())))
    return found


def windows(document: Document, number: int, window: int, stride: int, tokenizer: Tokenizer) -> list[Window]:
    """The windows of a document that score anything. stride < window, so that each scored token has one before it."""
    ids, scored, found = document.ids, document.ahead, list[Window]()
    bytes_from = list(accumulate((len(tokenizer.token_bytes(id)) for id in reversed(ids)), initial=0))[::-1]
    left = document.text_bytes  # not bytes_from[scored]: the blank that the tokenizer puts in front is not the text's
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        if end > scored:
            found.append(Window(number, ids[begin : end - 1], ids[scored:end], left - bytes_from[end]))
            scored, left = end, bytes_from[end]
        if end == len(ids):
            break
    return found


def together(all_windows: Sequence[Window], room: int) -> list[range]:
    """Windows, by number, whose inputs fit into one step; one that is longer stands alone."""
    groups, first, used = [], 0, 0
    for number, window in enumerate(all_windows):
        if number > first and used + len(window.inputs) > room:
            groups.append(range(first, number))
            first, used = number, 0
        used += len(window.inputs)
    return [*groups, range(first, len(all_windows))]


def blocks_needed(all_windows: Sequence[Window], groups: Sequence[range]) -> int:
    """KV blocks that hold any one group."""
    return max(sum(-(-len(all_windows[number].inputs) // BLOCK_SIZE) for number in group) for group in groups)


def steps(all_windows: Sequence[Window], group: range, room: int) -> Iterator[Step]:
    """A group in one step; a window longer than a step in several."""
    counts = [-(-len(all_windows[number].inputs) // BLOCK_SIZE) for number in group]
    bases = list(accumulate(counts, initial=0))
    longest = max(len(all_windows[number].inputs) for number in group)
    for start in range(0, longest, room):
        rows, last = [], []
        for slot, number in enumerate(group):
            window = all_windows[number]
            tokens = window.inputs[start : start + room]
            end = start + len(tokens)
            blocks = tuple(range(bases[slot], bases[slot] - (-end // BLOCK_SIZE)))
            rows.append(Row(slot, start, tokens, blocks, False, 1, Sampling(0)))
            last.append(min(len(tokens), max(0, end - (len(window.inputs) - len(window.targets)))))
        yield Step(tuple(rows), tuple(last), tuple(group))


def measure(
    engine: Engine, all_windows: Sequence[Window], on_step: Callable[[Step], None] | None = None, room: int = STEP_TOKENS
) -> Numbers:
    """Each window's loss: the sum of −log p over its targets, in nats. Call on every rank; all return the same. After each step on_step."""
    losses = np.zeros(len(all_windows))
    done = [0] * len(all_windows)
    for group in together(all_windows, room):
        for step in steps(all_windows, group, room):
            targets = [
                target
                for number, count in zip(step.windows, step.last, strict=True)
                for target in all_windows[number].targets[done[number] : done[number] + count]
            ]
            logits = engine.logits(StepPlan(Kind.STEP, rows=step.rows), step.last)
            loss = F.cross_entropy(logits.float(), torch.tensor(targets, dtype=torch.int64, device=logits.device), reduction="none")
            sums = torch.stack([part.sum() for part in torch.split(loss.double(), list(step.last))]).tolist()
            for number, count, part in zip(step.windows, step.last, sums, strict=True):
                losses[number] += part
                done[number] += count
            if on_step is not None:
                on_step(step)
    return losses


# ---- what the losses say


@dataclass(frozen=True)
class Estimate:
    """A value with the interval that holds it in CONFIDENCE of all resamples; None where there are too few units to resample."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Result:
    """One precision's figures."""

    loss: float  # nats per token
    perplexity: Estimate
    bits_per_byte: Estimate
    delta: Estimate  # of perplexity against the first precision, as a share; the same resamples, so its interval is its own


@dataclass(frozen=True)
class Outcome:
    tokens: int
    text_bytes: int
    unit: str  # what was resampled
    units: int
    results: tuple[Result, ...]  # one per precision


def evaluate(all_windows: Sequence[Window], losses: Sequence[Numbers], seed: int) -> Outcome:
    """Figures of each precision from its windows' losses; intervals by a bootstrap over documents, or over windows of few documents."""
    owners = np.array([window.document for window in all_windows])
    unit = "documents"
    if len(np.unique(owners)) < ENOUGH_UNITS:
        unit, owners = "windows", np.arange(len(all_windows))
    _, places = np.unique(owners, return_inverse=True)
    tokens = np.bincount(places, [len(window.targets) for window in all_windows])
    sizes = np.bincount(places, [window.text_bytes for window in all_windows])
    by_unit = np.stack([np.bincount(places, loss) for loss in losses])  # [precisions, units]
    units = by_unit.shape[1]

    draw = np.random.default_rng(seed)
    drawn = (draw.integers(units, size=units) for _ in range(RESAMPLES))
    resampled = np.array([[*by_unit[:, pick].sum(1), tokens[pick].sum(), sizes[pick].sum()] for pick in drawn])
    means = resampled[:, :-2] / resampled[:, -2:-1]  # [resamples, precisions] nats per token
    bits = resampled[:, :-2] / resampled[:, -1:] / math.log(2)
    results = []
    for index, total in enumerate(by_unit.sum(1)):
        mean = float(total / tokens.sum())
        apart = mean - float(by_unit[0].sum() / tokens.sum())
        results.append(
            Result(
                loss=mean,
                perplexity=_estimate(math.exp(mean), np.exp(means[:, index]), units),
                bits_per_byte=_estimate(float(total / sizes.sum() / math.log(2)), bits[:, index], units),
                delta=_estimate(math.expm1(apart), np.expm1(means[:, index] - means[:, 0]), units),
            )
        )
    return Outcome(int(tokens.sum()), int(sizes.sum()), unit, units, tuple(results))


def _estimate(value: float, resampled: Numbers, units: int) -> Estimate:
    if units < ENOUGH_UNITS:
        return Estimate(value, None, None)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))
