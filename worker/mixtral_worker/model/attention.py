"""Grouped-query attention over paged keys and values.

A step's tokens come as one flat batch. Rows of one token (decodes) are computed together, each group's query heads folded into the
rows of one matrix product, so that keys and values are read once per group. Longer rows (prefill chunks) are computed one by one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.kv_cache import KVCache
from mixtral_worker.model.parallel import ColumnParallelLinear, RowParallelLinear, Shard
from mixtral_worker.model.rope import rotate_

# T tokens this step, B decode rows, C tokens of a chunk, S context, H query heads, K kv heads (both of this rank), G = H / K, D head size.


@dataclass(frozen=True)
class Decodes:
    """Rows of one token each, with contexts of any length."""

    tokens: slice  # their places in the flat batch
    table: Tensor  # [B, n] blocks; a shorter row repeats a block of its own
    bias: Tensor  # [K·B, 1, S]: 0 where the row may look, -inf beyond its end


@dataclass(frozen=True)
class Chunk:
    """Several new tokens of one sequence."""

    tokens: slice
    table: Tensor  # [1, n] blocks
    end: int  # positions known once the chunk is stored
    mask: Tensor | None  # [C, S] true where a token may look; None if the chunk is the sequence's beginning


@dataclass(frozen=True)
class Batch:
    """One step's tokens and where their contexts lie."""

    tokens: Tensor  # [T]
    rotation: Tensor  # [T, D / 2]
    slots: Tensor  # [T] where the cache keeps each token
    parts: tuple[Decodes | Chunk, ...]  # together all tokens


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, shard: Shard) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads = config.n_heads // shard.count, config.n_kv_heads // shard.count
        self.head_dim = config.head_dim
        width = config.n_heads * config.head_dim
        self.wqkv = ColumnParallelLinear(config.dim, width + 2 * config.n_kv_heads * config.head_dim, shard)
        self.wo = RowParallelLinear(width, config.dim, shard)

    def forward(self, x: Tensor, batch: Batch, cache: KVCache) -> Tensor:  # [T, dim] → [T, dim]
        qkv = self.wqkv(x).view(len(x), -1, self.head_dim)  # [T, H + 2K, D]
        rotate_(qkv[:, : self.n_heads + self.n_kv_heads], batch.rotation)
        queries, kv = qkv.split((self.n_heads, 2 * self.n_kv_heads), dim=1)
        cache.write(self.layer, batch.slots, kv.view(len(x), 2, -1, self.head_dim))
        parts = [self.attend(queries[part.tokens], part, cache) for part in batch.parts]
        mixed: Tensor = self.wo((parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1))
        return mixed

    def attend(self, queries: Tensor, part: Decodes | Chunk, cache: KVCache) -> Tensor:  # [·, H, D] → [·, H, D]
        keys, values = cache.read(self.layer, part.table)  # [K, B, S, D]
        grouped = queries.view(len(queries), self.n_kv_heads, -1, self.head_dim)  # [·, K, G, D]
        if isinstance(part, Decodes):
            return _decode(grouped, keys, values, part.bias).flatten(1, 2)
        return _prefill(grouped, keys[:, :, : part.end], values[:, :, : part.end], part.mask).flatten(1, 2)


def _decode(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """queries [B, K, G, D]; keys, values [K, B, S, D] → [B, K, G, D]."""
    rows, n_kv_heads, group, head_dim = queries.shape
    folded = queries.transpose(0, 1).reshape(-1, group, head_dim)  # [K·B, G, D]
    scores = torch.baddbmm(bias, folded, keys.flatten(0, 1).transpose(1, 2), alpha=head_dim**-0.5)  # [K·B, G, S]
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    mixed = torch.bmm(weights, values.flatten(0, 1))
    return mixed.view(n_kv_heads, rows, group, head_dim).transpose(0, 1)


def _prefill(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """queries [C, K, G, D]; keys, values [K, 1, S, D] → [C, K, G, D]."""
    rows = queries.permute(1, 2, 0, 3)  # [K, G, C, D]
    group = rows.shape[1]
    keys, values = keys.expand(-1, group, -1, -1), values.expand(-1, group, -1, -1)
    mixed = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, is_causal=mask is None)
    return mixed.permute(2, 0, 1, 3)
