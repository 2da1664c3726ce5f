"""Blocks are never handed out twice, never lost, and counted."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixtral_worker.blocks import BlockPool, OutOfBlocks


class Owners(RuleBasedStateMachine):
    """Many owners allocate, share and free; a plain list of who holds what is the truth."""

    held: list[list[int]]

    @initialize(size=st.integers(1, 12))
    def open(self, size: int) -> None:
        self.pool = BlockPool(size)
        self.held = []

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        free = self.pool.num_blocks - len(self.owned)
        if count > free:
            with pytest.raises(OutOfBlocks, match=f"{count} blocks asked for; {free} of {self.pool.num_blocks} are free"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & self.owned
        assert all(0 <= block < self.pool.num_blocks for block in blocks)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.share(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @property
    def owned(self) -> set[int]:
        return {block for blocks in self.held for block in blocks}

    @invariant()
    def every_block_is_free_or_owned(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.free_blocks == self.pool.num_blocks - len(self.owned)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks in self.held:
                self.pool.free(blocks)
            assert sorted(self.pool.allocate(self.pool.num_blocks)) == list(range(self.pool.num_blocks))


TestOwners = Owners.TestCase


def test_freeing_a_free_block_is_refused() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(ValueError, match="has no owner"):
        pool.free(blocks)
    assert pool.free_blocks == 2


def test_a_shared_block_is_free_only_when_its_last_owner_lets_go() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.free_blocks == 0
    pool.free(blocks)
    assert pool.free_blocks == 1


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_a_begun_block_counts_whole(tokens: int, blocks: int) -> None:
    assert BlockPool(1, block_size=16).blocks_for(tokens) == blocks


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
