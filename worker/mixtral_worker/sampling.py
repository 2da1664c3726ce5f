"""Which token comes next: the Gumbel maximum.

What a row is drawn from is made in this order (vLLM's): logprobs are taken of the model's own logits, the row is steered
(penalties.py), divided by the temperature, and cut by min_p, top_k and top_p.

The draw at one offset of one job is the argmax over the kept candidates of logit / temperature + g(seed, offset, token id), with g
a Gumbel variate made from a hash of those three numbers. That is a draw from the softmax, yet it depends on no batch, slot, worker
or history: a job that moves to another worker goes on with the draws it would have had. The hash is integer arithmetic, the same
on every device: seed and offset make a 64-bit key by SplitMix64's mixer (Steele, Lea, Flood 2014), key and token id make 32 bits
by the mixer lowbias32 (Wellons 2018), half of the key entering before its first round and half before its second.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixtral_worker.penalties import Steered, steer
from mixtral_worker.plan import Sampling as Sampling
from mixtral_worker.steering import Chances

# B rows that sample, V vocabulary, K candidates.

NOT_FINITE = -1
LEAST_CHANCE = -9999.0  # JSON has no infinity; OpenAI's own number for a token that is out of reach
FIRST_CANDIDATES = 64  # a nucleus is looked for among so many first: sorting a whole vocabulary takes longer than a forward pass
MORE_CANDIDATES = 8  # … and then among so many times more


def sample(logits: Tensor, settings: Sequence[Sampling], offsets: Sequence[int], steered: Steered = ()) -> Tensor:
    """Draw one id per row. logits [B, V] → ids [B] on the CPU; NOT_FINITE where a row's logits hold NaN or infinity.

    Temperature 0 takes the best token, the lowest id of equals. min_p keeps what has at least min_p of the best one's probability; of
    that top_k keeps the k best and all that equal the last of them; then top_p the best that together reach top_p of what is left, again
    with equals. Logits of steered rows are overwritten, and their chances left with them; NOT_FINITE also where a grammar failed.
    """
    logits = logits.float()
    is_broken = ~logits.sum(-1).isfinite()  # a sum is finite only if every term is
    asked = [(row, one) for row, one in steered if one.wishes.top_logprobs is not None]
    chances = logits[[row for row, _ in asked]].log_softmax(-1) if asked else None
    if steered:
        is_broken[steer(logits, steered)] = True
    scores = logits
    if any(s.temperature for s in settings):
        scores = _scores(logits, settings, offsets)
    ids = scores.max(-1).indices.masked_fill_(is_broken, NOT_FINITE).cpu()  # of equals the first
    if chances is not None:
        _leave_chances(chances, asked, ids)
    return ids


def gumbel(seeds: Tensor, offsets: Tensor, vocab_size: int) -> Tensor:
    """g of every token id. seeds [B], offsets [B], both int64 → [B, V] float32."""
    first, second = keys(seeds, offsets)[:, :, None].unbind(1)
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    x = first + tokens * _signed(0x9E3779B9, 32)  # [B, V]
    x ^= _shift(x, 16, 32)
    x *= 0x7FEB352D
    x ^= _shift(x, 15, 32)
    x += second
    x *= _signed(0x846CA68B, 32)
    x ^= _shift(x, 16, 32)
    # A uniform variate from 31 bits; the clamp keeps what rounds up to 1 below it. Small ones, which win, keep all their bits.
    uniform = x.bitwise_and_(2**31 - 1).float().add_(0.5).mul_(2**-31).clamp_max_(1 - 2**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def keys(seeds: Tensor, offsets: Tensor) -> Tensor:
    """What the noise of a draw is made from. seeds [B], offsets [B], both int64 → [B, 2] int32."""
    key = _mix64(_mix64(seeds + _signed(0x9E3779B97F4A7C15, 64)) + offsets)
    return torch.stack((_signed_low_word(key), _signed_low_word(key >> 32)), 1)


def _scores(logits: Tensor, settings: Sequence[Sampling], offsets: Sequence[int]) -> Tensor:
    """What each row takes the maximum of. [B, V] → [B, V]; a greedy row's logits stay as they are."""
    device = logits.device
    is_drawn = torch.tensor([s.temperature > 0 for s in settings], device=device)[:, None]
    temperature = torch.tensor([s.temperature or 1.0 for s in settings], device=device)[:, None]
    scores = logits / temperature.clamp_min(1e-6)  # below that the noise is nothing beside any difference of two logits
    if any(s.temperature and s.min_p for s in settings):
        least = torch.tensor([math.log(s.min_p) if s.temperature and s.min_p else -math.inf for s in settings], device=device)[:, None]
        scores = scores.where(scores >= scores.amax(-1, keepdim=True) + least, -torch.inf)
    if any(s.temperature and (s.top_k or s.top_p < 1) for s in settings):
        scores = scores.where(scores >= _floor(scores, settings), -torch.inf)
    noise = gumbel(torch.tensor([s.seed for s in settings], device=device), torch.tensor(offsets, device=device), logits.shape[1])
    return scores.add_(noise.mul_(is_drawn))


def _floor(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The lowest score that each row keeps. scores [B, V] → [B, 1]."""
    device, vocab_size = scores.device, scores.shape[1]
    keeps_all = [not s.temperature or (not s.top_k and s.top_p == 1) for s in settings]
    top_k = torch.tensor([min(s.top_k or vocab_size, vocab_size) for s in settings], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in settings], device=device)[:, None]
    asked = [s.top_k or FIRST_CANDIDATES for s, free in zip(settings, keeps_all, strict=True) if not free]
    count = min(max(asked), vocab_size)
    everything = scores.logsumexp(-1, keepdim=True)
    unlimited = torch.tensor(keeps_all, device=device)[:, None]
    while True:
        best = scores.topk(count).values  # [B, K], falling
        best = best.masked_fill(torch.arange(count, device=device) >= top_k, -torch.inf)
        whole = torch.where(top_k < vocab_size, best.logsumexp(-1, keepdim=True), everything)
        share = (best - whole).exp()
        is_kept = (share.cumsum(-1) - share < top_p) & (best > -torch.inf)  # while those ahead do not reach top_p
        last = is_kept.sum(-1, keepdim=True) - 1
        if count == vocab_size or not bool(((last == count - 1) & (top_k > count) & ~unlimited).any()):
            return best.gather(1, last.clamp_min(0)).masked_fill(unlimited, -torch.inf)
        count = min(count * MORE_CANDIDATES, vocab_size)


def _leave_chances(chances: Tensor, asked: Steered, ids: Tensor) -> None:
    """chances [asked, V], log probabilities; ids [B]."""
    drawn = ids[[row for row, _ in asked]].clamp_min(0).to(chances.device)
    own = chances.gather(1, drawn[:, None])[:, 0].clamp_min(LEAST_CHANCE).tolist()
    best = chances.topk(min(max(one.wishes.top_logprobs or 0 for _, one in asked), chances.shape[1]))
    values, tokens = best.values.clamp_min(LEAST_CHANCE).tolist(), best.indices.tolist()
    for place, (_, one) in enumerate(asked):
        top = list(zip(tokens[place], values[place], strict=True))
        one.chances = Chances(own[place], top[: one.wishes.top_logprobs])


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift(x, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift(x, 31, 64)


def _shift(x: Tensor, count: int, width: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> count).bitwise_and_((1 << (width - count)) - 1)


def _signed(word: int, width: int) -> int:
    """The signed number with these bits; torch multiplies signed words only, and wraps."""
    return word - (1 << width) if word >> (width - 1) else word


def _signed_low_word(x: Tensor) -> Tensor:
    return ((x << 32) >> 32).to(torch.int32)
