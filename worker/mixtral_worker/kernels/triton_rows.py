"""Triton kernels for what is done to each row of a step by itself: norms, the router, and the draw of the next id.

Each function launches one kernel on tensors that the caller made. What they compute is what the modules of model/ and sampling.py
compute; the tests hold them equal, on a card and, by Triton's interpreter, on a CPU. When they are used is gpu_step.py's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# T rows, V vocabulary.


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """x [T, dim] += delta, then out = its RMS norm, times weight."""
    grid, block = (len(x),), triton.next_power_of_2(x.shape[1])
    _add_norm[grid](x, x if delta is None else delta, weight, out, x.shape[1], eps, delta is not None, block, num_warps=8)


def route(x: Tensor, gate: Tensor, lengths: Tensor, per_token: int, renormalise: bool, weights: Tensor, counts: Tensor) -> None:
    """weights [T, all experts] float32: each row's experts, 0 for others and for rows of length 0; counts [all experts] of the chosen."""
    n_experts, dim = gate.shape
    blocks = triton.next_power_of_2(n_experts), min(2048, triton.next_power_of_2(dim))
    _route[(len(x),)](x, gate, lengths, weights, counts, dim, n_experts, per_token, renormalise, *blocks, num_warps=16)


def draw(logits: Tensor, vocab_size: int, numbers: Tensor, words: Tensor, ids: Tensor) -> None:
    """sampling.sample of rows that are not steered. logits [T, V], of which the first vocab_size may be drawn → ids [T] int32.

    numbers [T, 3] float32: temperature, logarithm of min_p, top_p. words [T, 3] int32: top_k or 0, and the two halves of the key that
    sampling.keys makes of seed and offset.
    """
    block: int = triton.next_power_of_2(vocab_size)
    _draw[(len(logits),)](logits, numbers, words, ids, logits.shape[1], vocab_size, block, num_warps=32 if block > 8192 else 4)


@triton.jit
def _add_norm(x, delta, weight, out, dim, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    kind = x.dtype.element_ty
    exact = tl.load(x + row * dim + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        summed = (exact + tl.load(delta + row * dim + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(x + row * dim + at, summed, mask=inside)
        exact = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / dim + eps)
    scaled = exact * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * dim + at, scaled.to(kind), mask=inside)


@triton.jit
def _route(
    x,
    gate,
    lengths,
    weights,
    counts,
    dim,
    n_experts,
    PER_TOKEN: tl.constexpr,
    RENORMALISE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert, at = tl.arange(0, EXPERTS), tl.arange(0, BLOCK)
    is_expert = expert < n_experts
    products = tl.zeros((EXPERTS, BLOCK), tl.float32)
    for first in range(0, dim, BLOCK):
        here = first + at
        values = tl.load(x + row * dim + here, mask=here < dim, other=0.0).to(tl.float32)
        of_gate = tl.load(gate + expert[:, None] * dim + here[None, :], mask=is_expert[:, None] & (here < dim)[None, :], other=0.0)
        products += of_gate.to(tl.float32) * values[None, :]
    logits = tl.where(is_expert, tl.sum(products, 1), float("-inf"))
    left = logits
    chosen = expert < 0
    for _ in tl.static_range(PER_TOKEN):
        best = tl.min(tl.where(left == tl.max(left, 0), expert, EXPERTS), 0)  # of equals the first
        chosen = chosen | (expert == best)
        left = tl.where(expert == best, float("-inf"), left)
    powers = tl.exp(logits - tl.max(logits, 0))
    whole = tl.sum(tl.where(chosen, powers, 0.0), 0) if RENORMALISE else tl.sum(powers, 0)
    is_row = tl.load(lengths + row) > 0
    kept = chosen & is_row & is_expert
    tl.store(weights + row * n_experts + expert, tl.where(kept, powers / whole, 0.0), mask=is_expert)
    tl.atomic_add(counts + expert, kept.to(tl.int64), mask=is_expert)


@triton.jit
def _draw(logits, numbers, words, ids, stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    is_token = token < vocab_size
    scores = tl.load(logits + row * stride + token, mask=is_token, other=float("-inf")).to(tl.float32)
    whole = tl.sum(tl.where(is_token, scores, 0.0), 0)
    is_broken = (whole != whole) | (tl.abs(whole) == float("inf"))
    temperature, log_min_p = tl.load(numbers + row * 3), tl.load(numbers + row * 3 + 1)
    top_p, top_k = tl.load(numbers + row * 3 + 2), tl.load(words + row * 3)
    if temperature > 0:
        scores = scores / tl.maximum(temperature, 1e-6)
        best = tl.max(scores, 0)
        scores = tl.where(scores >= best + log_min_p, scores, float("-inf"))
        powers = tl.exp(scores - best)
        everything = tl.sum(powers, 0)
        if top_k > 0:
            last = _lowest_kept(scores, powers * 0.0 + 1.0, top_k * 1.0)
            ahead = scores > last
            beside = top_k - tl.sum(ahead.to(tl.int32), 0)  # of those that equal the last, so many count for the nucleus
            everything = tl.sum(tl.where(ahead, powers, 0.0), 0) + beside * tl.exp(last - best)
            scores = tl.where(scores >= last, scores, float("-inf"))
        if top_p < 1:
            powers = tl.exp(scores - best)
            scores = tl.where(scores >= _lowest_kept(scores, powers, top_p * everything), scores, float("-inf"))
        scores += _gumbel(tl.load(words + row * 3 + 1), tl.load(words + row * 3 + 2), token)
    drawn = tl.min(tl.where(scores == tl.max(scores, 0), token, BLOCK), 0)  # of equals the first
    tl.store(ids + row, tl.where(is_broken, -1, drawn))


@triton.jit
def _lowest_kept(scores, weights, enough):
    """The highest score at which what lies there and above weighs enough; -inf if all together do not.

    Found bit by bit, in the order of floats as integers: the sign turned over, of negative ones all bits.
    """
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)  # -0 becomes 0
    order = tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)
    found = tl.min(order, 0) & 0
    for bit in tl.static_range(32):
        higher = found | (0x80000000 >> bit)
        found = tl.where(tl.sum(tl.where(order >= higher, weights, 0.0), 0) >= enough, higher, found)
    return tl.min(tl.where(order >= found, scores, float("inf")), 0)


@triton.jit
def _gumbel(first, second, token):
    """sampling.gumbel of every token."""
    x = first.to(tl.uint32, bitcast=True) + token.to(tl.uint32) * 0x9E3779B9
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x += second.to(tl.uint32, bitcast=True)
    x *= 0x846CA68B
    x ^= x >> 16
    uniform = tl.minimum(((x & 0x7FFFFFFF).to(tl.float32) + 0.5) * (2.0**-31), 1 - 2.0**-24)
    rest = 1.0 - uniform
    # log1p(-uniform), which Triton lacks: what the subtraction rounded off is put right by its own measure (Kahan).
    is_lost = rest == 1.0
    logarithm = tl.where(is_lost, -uniform, tl.log(rest) * (uniform / tl.where(is_lost, 1.0, 1.0 - rest)))
    return -tl.log(-logarithm)
