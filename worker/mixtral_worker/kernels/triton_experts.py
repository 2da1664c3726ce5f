"""Triton kernels of the experts for steps of many tokens: each expert multiplies the tokens that chose it, and no others.

Tokens come sorted by expert; how many each has stays on the card. A program has a tile of rows of one expert and a stripe of its outputs,
and finds out which by itself; programs are launched for the most tiles that there can be, those left over end at once. torch's
grouped_mm computes the same: it is as good on Hopper alone, and elsewhere waits for the card in every layer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixtral_worker.kernels.triton_decode import LEAST_ROWS, Stripes, precision

# T tokens, k experts per token, P = T·k pairs of token and expert, E experts of this rank, F hidden size of an expert on it.

MOST_ROWS = 128  # of a tile

UP = {16: Stripes(64, 128), 32: Stripes(64, 128, num_stages=3), 64: Stripes(64, 64), 128: Stripes(64, 64, num_warps=8, num_stages=3)}
DOWN = {16: Stripes(64, 128), 32: Stripes(64, 128), 64: Stripes(128, 64), 128: Stripes(128, 64, num_warps=8, num_stages=3)}


def grouped_experts(x: Tensor, order: Tensor, ends: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """x [T, dim] → [P, dim], what each pair's expert makes of its token; of pairs of no expert of this rank undefined.

    order [P]: pairs sorted by expert; pair p is of token p // k. ends [E]: where each expert's pairs end in it. w13 [E, 2F, dim],
    w2 [E, dim, F].
    """
    n_experts, dim, hidden = w2.shape
    pairs = len(order)
    tile = rows_of_tile(pairs, n_experts)
    tiles, experts = pairs // tile + n_experts, triton.next_power_of_2(n_experts)
    per_token = pairs // len(x)
    inner = x.new_empty(pairs, hidden)
    cut = UP[tile]
    _up[(tiles * triton.cdiv(hidden, cut.outputs),)](
        *(x, order, ends, w13, inner, tiles, dim, hidden, per_token, n_experts),
        *(experts, tile, cut.outputs, cut.inputs, precision(x)),
        **cut.told(tile, 2, x),
    )
    out = x.new_empty(pairs, dim)
    cut = DOWN[tile]
    _down[(tiles * triton.cdiv(dim, cut.outputs),)](
        *(inner, order, ends, w2, out, tiles, dim, hidden, n_experts),
        *(experts, tile, cut.outputs, cut.inputs, precision(x)),
        **cut.told(tile, 1, x),
    )
    return out


def rows_of_tile(pairs: int, n_experts: int) -> int:
    """As many rows as an expert has in the mean."""
    mean: int = triton.next_power_of_2(triton.cdiv(pairs, n_experts))
    return max(LEAST_ROWS, min(MOST_ROWS, mean))


@triton.jit
def _tile(ends, tile, n_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Which expert the tile belongs to, and its rows: from, to. The expert is n_experts for a tile that is left over."""
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < n_experts
    end = tl.load(ends + expert, mask=is_expert, other=0).to(tl.int32)
    begin = tl.load(ends + expert - 1, mask=is_expert & (expert > 0), other=0).to(tl.int32)
    tiles = tl.where(is_expert, (end - begin + ROWS - 1) // ROWS, 0)
    behind = tl.cumsum(tiles, 0)
    mine = tl.sum(((behind <= tile) & is_expert).to(tl.int32), 0)
    is_mine = expert == mine
    first = tl.sum(tl.where(is_mine, begin + (tile - (behind - tiles)) * ROWS, 0), 0)
    last = tl.sum(tl.where(is_mine, end, 0), 0)
    return mine, first, tl.minimum(first + ROWS, last)


@triton.jit
def _up(
    x,
    order,
    ends,
    w13,
    out,
    tiles,
    dim,
    hidden,
    per_token,
    n_experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, last = _tile(ends, tl.program_id(0) % tiles, n_experts, EXPERTS, ROWS)
    if expert >= n_experts:
        return
    place = first + tl.arange(0, ROWS)
    is_row = place < last
    token = tl.load(order + place, mask=is_row, other=0) // per_token
    output, input = tl.program_id(0) // tiles * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    is_output = output < hidden
    gated, linear = tl.zeros((ROWS, OUTPUTS), tl.float32), tl.zeros((ROWS, OUTPUTS), tl.float32)
    w1 = w13 + (expert.to(tl.int64) * 2 * hidden + output[None, :]) * dim
    left_rows = x + token[:, None] * dim
    for at in range(0, dim, INPUTS):
        here = at + input
        is_input = here < dim
        left = tl.load(left_rows + here[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        wanted = is_input[:, None] & is_output[None, :]
        gated = tl.dot(left, tl.load(w1 + here[:, None], mask=wanted, other=0.0), gated, input_precision=PRECISION)
        linear = tl.dot(left, tl.load(w1 + hidden * dim + here[:, None], mask=wanted, other=0.0), linear, input_precision=PRECISION)
    value = gated * tl.sigmoid(gated) * linear
    there = out + place[:, None].to(tl.int64) * hidden + output[None, :]
    tl.store(there, value.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit
def _down(
    x,
    order,
    ends,
    w2,
    out,
    tiles,
    dim,
    hidden,
    n_experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, last = _tile(ends, tl.program_id(0) % tiles, n_experts, EXPERTS, ROWS)
    if expert >= n_experts:
        return
    place = first + tl.arange(0, ROWS)
    is_row = place < last
    output, input = tl.program_id(0) // tiles * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    is_output = output < dim
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    left_rows = x + place[:, None].to(tl.int64) * hidden
    right_rows = w2 + (expert.to(tl.int64) * dim + output[None, :]) * hidden
    for at in range(0, hidden, INPUTS):
        here = at + input
        is_input = here < hidden
        left = tl.load(left_rows + here[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        right = tl.load(right_rows + here[:, None], mask=is_input[:, None] & is_output[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    pair = tl.load(order + place, mask=is_row, other=0)
    there = out + pair[:, None] * dim + output[None, :]
    tl.store(there, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])
