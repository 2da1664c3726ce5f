"""Triton kernels of a decode step: what lies between the matrix products of a layer, attention over paged keys and values, and experts.

Each function launches one kernel on tensors that the caller made. What they compute is what the modules of model/ compute; the tests hold
them equal, on a card and, by Triton's interpreter, on a CPU. Their order, their buffers and when they are used are gpu_decode.py's.

The experts read each chosen expert's weights once whatever the batch: a program has a stripe of one expert and multiplies it with every
row of the step, those that did not choose the expert included. Up to 64 rows that costs nothing, for the step waits for the weights; and
nothing has to be sorted or counted. A program whose expert nobody chose ends at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# T rows of one token each, H query heads, K kv heads (both of this rank), D head size, E experts of this rank, F hidden size of an expert
# on it, N blocks, P positions per block, W width of the block tables, S splits of a sum.

LEAST_ROWS = 16  # of a matrix that tensor cores take
TILE = 64  # positions of a context that are looked at together


@dataclass(frozen=True)
class Stripes:
    """How a product is cut: outputs per program, inputs per round of its loop, parts of the sum, and what the compiler is told."""

    outputs: int
    inputs: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def told(self, rows: int, matrices: int, x: Tensor) -> dict[str, int]:
        """What the compiler is told: as many stages, each a tile of rows and of every matrix, as the card has shared memory for."""
        stage_bytes = (rows + matrices * self.outputs) * self.inputs * x.element_size()
        fitting = _shared_bytes(x.device) // stage_bytes
        return {"num_warps": self.num_warps, "num_stages": max(1, min(self.num_stages, fitting))}


# Of those tried on an H200 (torch 2.11, Triton 3.6) the fastest: 4.1 to 4.4 TB/s, where a copy reaches 4.3.
UP = {16: Stripes(64, 128), 32: Stripes(64, 128, num_stages=3), 64: Stripes(64, 128)}
DOWN = {16: Stripes(32, 256, splits=4, num_stages=3), 32: Stripes(64, 128, splits=4), 64: Stripes(64, 128)}


def rows_of_tile(rows: int) -> int:
    tile: int = max(LEAST_ROWS, triton.next_power_of_2(rows))
    return tile


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """x [T, dim] += delta, then out = its RMS norm, times weight."""
    grid, block = (len(x),), triton.next_power_of_2(x.shape[1])
    _add_norm[grid](x, x if delta is None else delta, weight, out, x.shape[1], eps, delta is not None, block, num_warps=8)


def route(x: Tensor, gate: Tensor, lengths: Tensor, per_token: int, renormalise: bool, weights: Tensor, counts: Tensor) -> None:
    """weights [T, all experts] float32: each row's experts, 0 for others and for rows of length 0; counts [all experts] of the chosen."""
    n_experts, dim = gate.shape
    blocks = triton.next_power_of_2(n_experts), min(2048, triton.next_power_of_2(dim))
    _route[(len(x),)](x, gate, lengths, weights, counts, dim, n_experts, per_token, renormalise, *blocks, num_warps=16)


def rotate_and_store(qkv: Tensor, rotation: Tensor, lengths: Tensor, tables: Tensor, kv: Tensor, n_heads: int, block_size: int) -> None:
    """Turn query and key heads of qkv [T, H + 2K, D] to their positions, in place, and store keys and values in kv [2, K, N, P·D].

    rotation [S, D / 2, 2] float32. Row t is at position lengths[t] - 1; a row of length 0 stores nothing.
    """
    rows, heads, head_dim = qkv.shape
    n_kv_heads, half = kv.shape[1], triton.next_power_of_2(head_dim // 2)
    grid = (rows, heads)
    _rotate_and_store[grid](
        qkv, rotation, lengths, tables, kv, kv.shape[2], tables.shape[1], n_heads, n_kv_heads, head_dim, block_size, half, num_warps=1
    )


def attend(qkv: Tensor, lengths: Tensor, tables: Tensor, kv: Tensor, window: int, parts: Tensor, n_heads: int, block_size: int) -> None:
    """Each row's attention in S parts of its context. parts [T, H, S, D + 2] float32: weighted values, their weight, and the best score."""
    rows, heads, head_dim = qkv.shape
    n_kv_heads, group = kv.shape[1], n_heads // kv.shape[1]
    splits, width = parts.shape[2], max(LEAST_ROWS, triton.next_power_of_2(head_dim))
    _attend[(rows, n_kv_heads, splits)](
        *(qkv, lengths, tables, kv, parts, head_dim**-0.5, kv.shape[2], tables.shape[1], window),
        *(heads, n_kv_heads, group, head_dim, block_size, splits, rows_of_tile(group), TILE, width, precision(qkv)),
        num_warps=4,
    )


def join(parts: Tensor, out: Tensor) -> None:
    """The parts of attend [T, H, S, D + 2] → out [T, H·D]; 0 for rows of length 0."""
    rows, n_heads, splits, width = parts.shape
    _join[(rows, n_heads)](
        parts, out, n_heads, splits, width - 2, triton.next_power_of_2(splits), triton.next_power_of_2(width - 2), num_warps=4
    )


def experts_up(x: Tensor, w13: Tensor, weights: Tensor, first_expert: int, out: Tensor) -> None:
    """x [T, dim] through the first half of every expert that any row chose. w13 [E, 2F, dim] → out [E, T, F], of the others undefined."""
    n_experts, rows, hidden = out.shape
    tile, dim = rows_of_tile(rows), x.shape[1]
    cut = UP[tile]
    _experts_up[(n_experts, triton.cdiv(hidden, cut.outputs))](
        *(x, w13, weights, out, rows, dim, hidden, weights.shape[1], first_expert),
        *(tile, cut.outputs, cut.inputs, precision(x)),
        **cut.told(tile, 2, x),
    )


def experts_down(x: Tensor, w2: Tensor, weights: Tensor, first_expert: int, parts: Tensor) -> None:
    """x [E, T, F] through the second half of every expert that any row chose. w2 [E, dim, F] → parts [E, S, T, dim] float32."""
    n_experts, splits, rows, dim = parts.shape
    tile, hidden = rows_of_tile(rows), x.shape[2]
    cut = DOWN[tile]
    _experts_down[(n_experts, triton.cdiv(dim, cut.outputs), splits)](
        *(x, w2, weights, parts, rows, dim, hidden, weights.shape[1], first_expert, triton.cdiv(hidden, splits * cut.inputs)),
        *(splits, tile, cut.outputs, cut.inputs, precision(x)),
        **cut.told(tile, 1, x),
    )


def mix(parts: Tensor, weights: Tensor, first_expert: int, out: Tensor) -> None:
    """The weighted sum over experts and splits. parts [E, S, T, dim] → out [T, dim]."""
    n_experts, splits, rows, dim = parts.shape
    block = min(1024, triton.next_power_of_2(dim))
    _mix[(rows, triton.cdiv(dim, block))](
        parts, weights, out, rows, dim, weights.shape[1], first_expert, n_experts, splits, block, num_warps=4
    )


def draw(logits: Tensor, vocab_size: int, numbers: Tensor, words: Tensor, ids: Tensor) -> None:
    """sampling.sample of rows that are not steered. logits [T, V], of which the first vocab_size may be drawn → ids [T] int32.

    numbers [T, 3] float32: temperature, logarithm of min_p, top_p. words [T, 3] int32: top_k or 0, and the two halves of the key that
    sampling.keys makes of seed and offset.
    """
    block: int = triton.next_power_of_2(vocab_size)
    _draw[(len(logits),)](logits, numbers, words, ids, logits.shape[1], vocab_size, block, num_warps=32 if block > 8192 else 4)


def down_splits(rows: int) -> int:
    return DOWN[rows_of_tile(rows)].splits


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take; without end in the interpreter, which has no use for it."""
    if device.type != "cuda":
        return sys.maxsize
    found: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return found


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # the latter says nothing about products of 16 bits


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
def _rotate_and_store(
    qkv,
    rotation,
    lengths,
    tables,
    kv,
    n_blocks,
    table_width,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    if length == 0:
        return
    position = length - 1
    pair = tl.arange(0, HALF)
    inside = pair < HEAD_DIM // 2
    here = qkv + (row * (N_HEADS + 2 * N_KV_HEADS) + head) * HEAD_DIM
    first = tl.load(here + 2 * pair, mask=inside, other=0.0)
    second = tl.load(here + 2 * pair + 1, mask=inside, other=0.0)
    if head < N_HEADS + N_KV_HEADS:
        turn = rotation + position.to(tl.int64) * HEAD_DIM + 2 * pair
        cos, sin = tl.load(turn, mask=inside, other=0.0), tl.load(turn + 1, mask=inside, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * cos - b * sin).to(first.dtype), (a * sin + b * cos).to(second.dtype)
    if head < N_HEADS:
        tl.store(here + 2 * pair, first, mask=inside)
        tl.store(here + 2 * pair + 1, second, mask=inside)
    else:
        block = tl.load(tables + row * table_width + position // BLOCK_SIZE).to(tl.int64)
        place = (head - N_HEADS).to(tl.int64) * n_blocks + block  # keys of all heads first, then values: [2, K, N, …]
        there = kv + (place * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
        tl.store(there + 2 * pair, first, mask=inside)
        tl.store(there + 2 * pair + 1, second, mask=inside)


@triton.jit
def _attend(
    qkv,
    lengths,
    tables,
    kv,
    parts,
    scale,
    n_blocks,
    table_width,
    window,
    HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    begin = tl.maximum(0, length - window) if window > 0 else 0
    tiles = tl.cdiv(length - begin, TILE)
    stride = tl.cdiv(tiles, SPLITS) * TILE
    first = begin + split * stride
    last = tl.minimum(first + stride, length)
    query, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_query, is_column = query < GROUP, column < HEAD_DIM
    head = kv_head * GROUP + query
    queries = tl.load(
        qkv + (row * HEADS + head[:, None]) * HEAD_DIM + column[None, :], mask=is_query[:, None] & is_column[None, :], other=0.0
    )
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for at in range(first, last, TILE):
        position = at + tl.arange(0, TILE)
        known = position < last
        block = tl.load(tables + row * table_width + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        place = ((kv_head * n_blocks + block) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
        where = place[:, None] + column[None, :]
        wanted = known[:, None] & is_column[None, :]
        keys = tl.load(kv + where, mask=wanted, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(known[None, :], scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        powers = tl.exp(scores - better[:, None])
        fade = tl.exp(best - better)
        values = tl.load(kv + N_KV_HEADS * n_blocks * BLOCK_SIZE * HEAD_DIM + where, mask=wanted, other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(powers.to(values.dtype), values, input_precision=PRECISION)
        weight = weight * fade + tl.sum(powers, 1)
        best = better
    part = parts + ((row * N_KV_HEADS * GROUP + head) * SPLITS + split) * (HEAD_DIM + 2)
    tl.store(part[:, None] + column[None, :], mixed, mask=is_query[:, None] & is_column[None, :])
    tl.store(part + HEAD_DIM, weight, mask=is_query)
    tl.store(part + HEAD_DIM + 1, best, mask=is_query)


@triton.jit
def _join(
    parts,
    out,
    N_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, column = tl.arange(0, BLOCK_S), tl.arange(0, WIDTH)
    is_split, is_column = split < SPLITS, column < HEAD_DIM
    part = parts + ((row * N_HEADS + head) * SPLITS + split) * (HEAD_DIM + 2)
    best = tl.load(part + HEAD_DIM + 1, mask=is_split, other=float("-inf"))
    weight = tl.load(part + HEAD_DIM, mask=is_split, other=0.0)
    mixed = tl.load(part[:, None] + column[None, :], mask=is_split[:, None] & is_column[None, :], other=0.0)
    top = tl.max(best, 0)
    share = tl.exp(best - tl.where(top == float("-inf"), 0.0, top))  # 0 of an empty part, whose best is -inf
    whole = tl.sum(share * weight, 0)
    value = tl.sum(mixed * share[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + (row * N_HEADS + head) * HEAD_DIM + column, value.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _experts_up(
    x,
    w13,
    weights,
    out,
    rows,
    dim,
    hidden,
    all_experts,
    first_expert,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    weight = tl.load(weights + row * all_experts + first_expert + expert, mask=row < rows, other=0.0)
    if tl.max((weight != 0.0).to(tl.int32), 0) == 0:
        return
    output, input = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    is_row, is_output = row < rows, output < hidden
    gated, linear = tl.zeros((ROWS, OUTPUTS), tl.float32), tl.zeros((ROWS, OUTPUTS), tl.float32)
    w1 = w13 + (expert * 2 * hidden + output[None, :]) * dim
    for at in range(0, dim, INPUTS):
        is_input = at + input < dim
        here = at + input
        left = tl.load(x + row[:, None] * dim + here[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        wanted = is_input[:, None] & is_output[None, :]
        gated = tl.dot(left, tl.load(w1 + here[:, None], mask=wanted, other=0.0), gated, input_precision=PRECISION)
        linear = tl.dot(left, tl.load(w1 + hidden * dim + here[:, None], mask=wanted, other=0.0), linear, input_precision=PRECISION)
    value = gated * tl.sigmoid(gated) * linear
    place = out + (expert * rows + row[:, None]) * hidden + output[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit
def _experts_down(
    x,
    w2,
    weights,
    parts,
    rows,
    dim,
    hidden,
    all_experts,
    first_expert,
    rounds,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    row = tl.arange(0, ROWS)
    weight = tl.load(weights + row * all_experts + first_expert + expert, mask=row < rows, other=0.0)
    if tl.max((weight != 0.0).to(tl.int32), 0) == 0:
        return
    output, input = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    is_row, is_output = row < rows, output < dim
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for round in range(rounds):
        here = (split * rounds + round) * INPUTS + input
        is_input = here < hidden
        left = tl.load(x + (expert * rows + row[:, None]) * hidden + here[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        right = tl.load(
            w2 + (expert * dim + output[None, :]) * hidden + here[:, None], mask=is_input[:, None] & is_output[None, :], other=0.0
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    place = parts + ((expert * SPLITS + split) * rows + row[:, None]) * dim + output[None, :]
    tl.store(place, total, mask=is_row[:, None] & is_output[None, :])


@triton.jit
def _mix(
    parts,
    weights,
    out,
    rows,
    dim,
    all_experts,
    first_expert,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < dim
    total = tl.zeros((BLOCK,), tl.float32)
    for expert in range(EXPERTS):
        weight = tl.load(weights + row * all_experts + first_expert + expert)
        if weight != 0.0:
            of_expert = tl.zeros((BLOCK,), tl.float32)
            for split in tl.static_range(SPLITS):
                of_expert += tl.load(parts + ((expert * SPLITS + split) * rows + row) * dim + at, mask=inside, other=0.0)
            total += weight * of_expert
    tl.store(out + row * dim + at, total.to(out.dtype.element_ty), mask=inside)


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
