"""Triton kernels of attention over paged keys and values: of rows of one token, and of prompts' chunks.

Each function launches one kernel on tensors that the caller made. What they compute is what model/attention.py computes; the tests
hold them equal. Every token has a length, the positions known once the step is done, and an owner, the row of the tables that says where
its sequence lies. A token of length 0 is padding: it stores nothing and reads nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# T tokens, H query heads, K kv heads (both of this rank), G = H / K, D head size, N blocks, P positions per block, W width of the block
# tables, S splits of a context.

LEAST_ROWS = 16  # of a matrix that tensor cores take
TILE = 64  # positions of a context that are looked at together
CHUNK_TILE = 16  # tokens of a chunk that look at them together


def rotate_and_store(
    qkv: Tensor, rotation: Tensor, lengths: Tensor, owners: Tensor, tables: Tensor, kv: Tensor, n_heads: int, block_size: int
) -> None:
    """Turn query and key heads of qkv [T, H + 2K, D] to their positions, in place, and store keys and values in kv [2, K, N, P·D].

    rotation [S, D / 2, 2] float32. Token t is at position lengths[t] - 1; owners [T].
    """
    rows, heads, head_dim = qkv.shape
    n_kv_heads, half = kv.shape[1], triton.next_power_of_2(head_dim // 2)
    grid = (rows, heads)
    _rotate_and_store[grid](
        qkv,
        rotation,
        lengths,
        owners,
        tables,
        kv,
        kv.shape[2],
        tables.shape[1],
        n_heads,
        n_kv_heads,
        head_dim,
        block_size,
        half,
        num_warps=1,
    )


def attend(qkv: Tensor, lengths: Tensor, tables: Tensor, kv: Tensor, window: int, parts: Tensor, n_heads: int, block_size: int) -> None:
    """The attention of rows of one token, each its own owner, in S parts of its context.

    parts [T, H, S, D + 2] float32: weighted values, their weight, and the best score.
    """
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


def attend_chunk(
    qkv: Tensor, lengths: Tensor, owners: Tensor, tables: Tensor, kv: Tensor, window: int, out: Tensor, n_heads: int, block_size: int
) -> None:
    """Attention of tokens that stand together by sequence. qkv [C, H + 2K, D], C tokens in tiles of CHUNK_TILE, a tile all of one owner
    and its padding last → out [C, H·D], of padding undefined."""
    tokens, heads, head_dim = qkv.shape
    n_kv_heads, group = kv.shape[1], n_heads // kv.shape[1]
    _attend_chunk[(tokens // CHUNK_TILE, n_kv_heads)](
        *(qkv, lengths, owners, tables, kv, out, head_dim**-0.5, kv.shape[2], tables.shape[1], window),
        *(heads, n_kv_heads, group, head_dim, block_size, CHUNK_TILE, triton.next_power_of_2(group)),
        *(TILE, max(LEAST_ROWS, triton.next_power_of_2(head_dim)), precision(qkv)),
        num_warps=4,
    )


def rows_of_tile(rows: int) -> int:
    tile: int = max(LEAST_ROWS, triton.next_power_of_2(rows))
    return tile


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # the latter says nothing about products of 16 bits


@triton.jit
def _rotate_and_store(
    qkv,
    rotation,
    lengths,
    owners,
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
        owner = tl.load(owners + row).to(tl.int64)
        block = tl.load(tables + owner * table_width + position // BLOCK_SIZE).to(tl.int64)
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
def _attend_chunk(
    qkv,
    lengths,
    owners,
    tables,
    kv,
    out,
    scale,
    n_blocks,
    table_width,
    window,
    HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, kv_head = tl.program_id(0) * TOKENS, tl.program_id(1)
    if tl.load(lengths + first) == 0:
        return
    table = tables + tl.load(owners + first).to(tl.int64) * table_width
    query, column = tl.arange(0, TOKENS * WIDE_GROUP), tl.arange(0, WIDTH)  # the group's heads of one token stand together
    token, head = first + query // WIDE_GROUP, kv_head * GROUP + query % WIDE_GROUP
    length = tl.load(lengths + token)
    is_query = (query % WIDE_GROUP < GROUP) & (length > 0)
    is_column = column < HEAD_DIM
    queries = tl.load(
        qkv + (token[:, None].to(tl.int64) * HEADS + head[:, None]) * HEAD_DIM + column[None, :],
        mask=is_query[:, None] & is_column[None, :],
        other=0.0,
    )
    begin = tl.maximum(0, tl.load(lengths + first) - window) if window > 0 else 0  # of the first token, which looks back farthest
    last = tl.max(length, 0)
    best = tl.full((TOKENS * WIDE_GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((TOKENS * WIDE_GROUP,), tl.float32)
    mixed = tl.zeros((TOKENS * WIDE_GROUP, WIDTH), tl.float32)
    for at in range(begin, last, TILE):
        position = at + tl.arange(0, TILE)
        known = position < last
        block = tl.load(table + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        place = ((kv_head * n_blocks + block) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
        where = place[:, None] + column[None, :]
        wanted = known[:, None] & is_column[None, :]
        keys = tl.load(kv + where, mask=wanted, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        is_seen = position[None, :] < length[:, None]
        if window > 0:
            is_seen = is_seen & (position[None, :] >= length[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(better == float("-inf"), 0.0, better)  # of a query that sees nothing here
        powers = tl.exp(scores - base[:, None])
        fade = tl.exp(best - base)
        values = tl.load(kv + N_KV_HEADS * n_blocks * BLOCK_SIZE * HEAD_DIM + where, mask=wanted, other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(powers.to(values.dtype), values, input_precision=PRECISION)
        weight = weight * fade + tl.sum(powers, 1)
        best = better
    value = mixed / tl.where(weight == 0.0, 1.0, weight)[:, None]
    there = out + (token[:, None].to(tl.int64) * (N_KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + column[None, :]
    tl.store(there, value.to(out.dtype.element_ty), mask=is_query[:, None] & is_column[None, :])
