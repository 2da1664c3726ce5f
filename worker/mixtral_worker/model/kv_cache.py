"""Where keys and values lie: one tensor per worker, cut into blocks of fixed size that sequences own in any order.

Which block belongs to whom is blocks.py's; here they are only written, read and wiped.
"""

import math

import torch
from torch import Tensor

from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.parallel import Shard

# L layers, H kv heads of this rank, N blocks, P positions per block, D head size, T tokens this step, B rows, S context.


class KVCache:
    def __init__(
        self, config: ModelConfig, shard: Shard, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.n_kv_heads = config.n_kv_heads // shard.count
        self.head_dim = config.head_dim
        self.block_size = block_size
        # Heads stand outside blocks, so that gathered blocks are one batch of matrices [S, D] without another copy.
        shape = (config.n_layers, 2, self.n_kv_heads, num_blocks, block_size * config.head_dim)  # [L, 2, H, N, P·D]
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self._gathered = torch.empty(0, dtype=dtype, device=device)  # kept: fresh pages for each read would cost more than the copy

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store this step's keys and values. slots [T] = block · P + place in it, kv [T, 2, H, D]."""
        by_position = self.store[layer].view(2, self.n_kv_heads, -1, self.head_dim)  # [2, H, N·P, D]
        by_position.index_copy_(2, slots, kv.permute(1, 2, 0, 3))

    def read(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Gather whole sequences. table [B, n] of blocks → keys and values, each [H, B, n·P, D], good until the next read."""
        shape = (2, self.n_kv_heads, table.numel(), self.block_size * self.head_dim)
        if self._gathered.numel() < math.prod(shape):
            self._gathered = self.store.new_empty(math.prod(shape))
        gathered = self._gathered[: math.prod(shape)].view(shape)
        torch.index_select(self.store[layer], 2, table.flatten(), out=gathered)
        keys, values = gathered.view(2, self.n_kv_heads, table.shape[0], table.shape[1] * self.block_size, self.head_dim)
        return keys, values

    def wipe(self, blocks: Tensor) -> None:
        """Set blocks to zero before their first use: what an earlier owner left, NaN above all, would spoil even masked sums."""
        self.store.index_fill_(3, blocks, 0)
