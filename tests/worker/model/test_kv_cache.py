"""What is written at a position of a sequence is read there again, through any table of blocks."""

import torch

from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.kv_cache import KVCache
from mixtral_worker.model.parallel import Shard

CONFIG = ModelConfig(32, 2, 4, 2, 8, 24, 64, 6, 2)
BLOCK_SIZE = 4


def cache(num_blocks: int) -> KVCache:
    return KVCache(CONFIG, Shard(), num_blocks, BLOCK_SIZE, torch.float32, "cpu")


def test_keys_and_values_come_back_in_order_of_position() -> None:
    store, generator = cache(6), torch.Generator().manual_seed(0)
    tables = [[5, 0, 3], [1, 4, 2]]
    written = torch.randn(2, 3 * BLOCK_SIZE, 2, 2, 8, generator=generator)  # [row, position, key or value, head, D]
    for position in torch.randperm(3 * BLOCK_SIZE, generator=generator).tolist():
        slots = torch.tensor([table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for table in tables])
        store.write(1, slots, written[:, position])
    keys, values = store.read(1, torch.tensor(tables))  # each [head, row, position, D]
    assert torch.equal(keys, written[:, :, 0].permute(2, 0, 1, 3))
    assert torch.equal(values, written[:, :, 1].permute(2, 0, 1, 3))
    assert not store.store[0].any(), "the other layer is untouched"


def test_wiped_block_is_zero_in_every_layer_and_the_others_stay() -> None:
    store = cache(3)
    store.store.fill_(torch.nan)
    store.wipe(torch.tensor([1]))
    assert (store.store[:, :, :, 1] == 0).all()
    assert store.store[:, :, :, [0, 2]].isnan().all()


def test_rank_keeps_its_own_heads_only() -> None:
    half = KVCache(CONFIG, Shard(1, 2), 3, BLOCK_SIZE, torch.float32, "cpu")
    assert half.store.nbytes * 2 == cache(3).store.nbytes
