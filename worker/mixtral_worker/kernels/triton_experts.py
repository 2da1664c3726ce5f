"""Triton kernels of the experts, in two regimes; model/moe.py computes the same, and the tests hold them equal.

Few tokens, the decode steps: each chosen expert's weights are read once whatever the batch. A program has a stripe of one expert and
multiplies it with every row of the step, those that did not choose the expert included. Up to 64 rows that costs nothing, for the step
waits for the weights; and nothing has to be sorted or counted. A program whose expert nobody chose ends at once.

Many tokens: each expert multiplies the tokens that chose it, and no others. Tokens come sorted by expert; how many each has stays on the
card. A program has a tile of rows of one expert and a stripe of its outputs, and finds out which by itself; programs are launched for the
most tiles that there can be, those left over end at once. torch's grouped_mm takes 1.2 to 1.4 times as long on an H200, and before
Hopper waits for the card in every layer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_worker.kernels.triton_attention import LEAST_ROWS, precision, rows_of_tile

# T tokens, k experts per token, P = T·k pairs of token and expert, E experts of this rank, F hidden size of an expert on it, S splits of a
# sum.

MOST_ROWS = 128  # of a tile


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


# Of those tried on an H200 (torch 2.11, Triton 3.6) the fastest, by rows of a tile. Few tokens: 4.1 to 4.4 TB/s, where a copy reaches 4.3.
FEW_UP = {16: Stripes(64, 128), 32: Stripes(64, 128, num_stages=3), 64: Stripes(64, 128)}
FEW_DOWN = {16: Stripes(32, 256, splits=4, num_stages=3), 32: Stripes(64, 128, splits=4), 64: Stripes(64, 128)}
MANY_UP = {16: Stripes(64, 64), 32: Stripes(64, 64), 64: Stripes(64, 64, num_stages=3), 128: Stripes(64, 64, num_warps=8, num_stages=3)}
MANY_DOWN = {
    16: Stripes(128, 64, num_stages=3),
    32: Stripes(128, 64, num_stages=3),
    64: Stripes(128, 64, num_stages=3),
    128: Stripes(128, 64, num_warps=8),
}


def experts_up(x: Tensor, w13: Tensor, weights: Tensor, first_expert: int, out: Tensor) -> None:
    """x [T, dim] through the first half of every expert that any row chose. w13 [E, 2F, dim] → out [E, T, F], of the others undefined."""
    n_experts, rows, hidden = out.shape
    tile, dim = rows_of_tile(rows), x.shape[1]
    cut = FEW_UP[tile]
    _experts_up[(n_experts, triton.cdiv(hidden, cut.outputs))](
        *(x, w13, weights, out, rows, dim, hidden, weights.shape[1], first_expert),
        *(tile, cut.outputs, cut.inputs, precision(x)),
        **cut.told(tile, 2, x),
    )


def experts_down(x: Tensor, w2: Tensor, weights: Tensor, first_expert: int, parts: Tensor) -> None:
    """x [E, T, F] through the second half of every expert that any row chose. w2 [E, dim, F] → parts [E, S, T, dim] float32."""
    n_experts, splits, rows, dim = parts.shape
    tile, hidden = rows_of_tile(rows), x.shape[2]
    cut = FEW_DOWN[tile]
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


def down_splits(rows: int) -> int:
    return FEW_DOWN[rows_of_tile(rows)].splits


def grouped_experts(x: Tensor, order: Tensor, ends: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """x [T, dim] → [P, dim], what each pair's expert makes of its token; of pairs of no expert of this rank undefined.

    order [P]: pairs sorted by expert; pair p is of token p // k. ends [E]: where each expert's pairs end in it. w13 [E, 2F, dim],
    w2 [E, dim, F].
    """
    n_experts, dim, hidden = w2.shape
    pairs = len(order)
    tile = mean_tile(pairs, n_experts)
    tiles, experts = pairs // tile + n_experts, triton.next_power_of_2(n_experts)
    per_token = pairs // len(x)
    inner = x.new_empty(pairs, hidden)
    cut = MANY_UP[tile]
    _up[(tiles * triton.cdiv(hidden, cut.outputs),)](
        *(x, order, ends, w13, inner, tiles, dim, hidden, per_token, n_experts),
        *(experts, tile, cut.outputs, cut.inputs, precision(x)),
        **cut.told(tile, 2, x),
    )
    out = x.new_empty(pairs, dim)
    cut = MANY_DOWN[tile]
    _down[(tiles * triton.cdiv(dim, cut.outputs),)](
        *(inner, order, ends, w2, out, tiles, dim, hidden, n_experts),
        *(experts, tile, cut.outputs, cut.inputs, precision(x)),
        **cut.told(tile, 1, x),
    )
    return out


def mean_tile(pairs: int, n_experts: int) -> int:
    """As many rows as an expert has in the mean."""
    mean: int = triton.next_power_of_2(triton.cdiv(pairs, n_experts))
    return max(LEAST_ROWS, min(MOST_ROWS, mean))


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take; without end in the interpreter, which has no use for it."""
    if device.type != "cuda":
        return sys.maxsize
    found: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return found


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
