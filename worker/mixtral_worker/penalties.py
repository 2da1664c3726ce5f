"""What a job's own tokens and wishes do to its logits before a draw.

In this order, as in vLLM (docs.vllm.ai, Sampler), for the rows that ask for it and for no others:
1. a grammar's mask, and min_tokens: what may not be drawn becomes -inf;
2. logit_bias is added (OpenAI's definition);
3. repetition_penalty r over prompt and answer: a logit above 0 is divided by r, one below multiplied (Keskar et al. 2019,
   arXiv:1909.05858; transformers' RepetitionPenaltyLogitsProcessor);
4. over the answer alone, frequency_penalty × how often the token is there, and presence_penalty if it is there at all, are taken off
   (OpenAI's definition).
Temperature and the cuts come after, in sampling.py. Bookkeeping by job is steering.py's.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mixtral_worker.steering import Steering

# B rows that sample, V vocabulary, N entries of all steered rows together.

Steered = Sequence[tuple[int, Steering]]
"""Rows that are steered, by their number in the batch."""


def steer(logits: Tensor, rows: Steered) -> list[int]:
    """Change the logits [B, V], float32, of these rows in place. Returns the rows whose grammar failed; they must not be drawn from."""
    failed = _mask(logits, rows)
    _forbid(logits, rows)
    _bias(logits, [(row, one) for row, one in rows if one.wishes.logit_bias])
    _penalise(logits, [(row, one) for row, one in rows if one.wishes.penalises])
    return failed


def _mask(logits: Tensor, rows: Steered) -> list[int]:
    bound = [(row, one.grammar.mask()) for row, one in rows if one.grammar is not None]
    allowed = [(row, mask) for row, mask in bound if mask is not None]
    if allowed:
        at = torch.tensor([row for row, _ in allowed], device=logits.device)
        masks = torch.from_numpy(np.stack([mask for _, mask in allowed])).to(logits.device)
        logits[at] = logits[at].masked_fill_(~masks, -torch.inf)
    return [row for row, mask in bound if mask is None]


def _forbid(logits: Tensor, rows: Steered) -> None:
    entries = [(row, id) for row, one in rows for id in one.forbidden()]
    if entries:
        at, ids = torch.tensor(entries, device=logits.device).T
        logits[at, ids] = -torch.inf


def _bias(logits: Tensor, rows: Steered) -> None:
    entries = [(row, *entry) for row, one in rows for entry in one.wishes.logit_bias]
    if entries:
        at, ids, biases = zip(*entries, strict=True)
        place = torch.tensor(at, device=logits.device), torch.tensor(ids, device=logits.device)
        logits[place] += torch.tensor(biases, device=logits.device)


def _penalise(logits: Tensor, rows: Steered) -> None:
    if not rows:
        return
    tallies = [one.counts() for _, one in rows]
    sizes = [len(ids) for ids, _ in tallies]
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in tallies])).to(logits.device)  # [N]
    counts = torch.from_numpy(np.concatenate([counts for _, counts in tallies])).to(logits.device)  # [N]
    settings = [(row, one.wishes.repetition_penalty, one.wishes.presence_penalty, one.wishes.frequency_penalty) for row, one in rows]
    at, *penalties = zip(*settings, strict=True)
    place = torch.from_numpy(np.repeat(np.array(at), sizes)).to(logits.device), ids
    repetition, presence, frequency = torch.from_numpy(np.repeat(np.array(penalties, np.float32), sizes, axis=1)).to(logits.device)
    scores = logits[place]
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    logits[place] = scores - counts * frequency - (counts > 0) * presence
