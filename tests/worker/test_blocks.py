"""Blocks are never handed out twice, never lost, and counted; what is kept in them is found until its room is needed."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixtral_worker.blocks import BlockPool, OutOfBlocks, chain_key

KEYS = [bytes([number]) for number in range(6)]


class Owners(RuleBasedStateMachine):
    """Many owners allocate, share, keep and free; plain lists of who holds what and what is kept where are the truth."""

    held: list[list[int]]
    kept: dict[bytes, int]
    idle: list[int]  # kept blocks without an owner, longest unused first

    @initialize(size=st.integers(1, 12))
    def open(self, size: int) -> None:
        self.pool = BlockPool(size)
        self.held, self.kept, self.idle = [], {}, []

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        free = self.pool.num_blocks - len(self.owned)
        if count > free:
            with pytest.raises(OutOfBlocks, match=f"{count} blocks asked for; {free} of {self.pool.num_blocks} are free"):
                self.pool.allocate(count)
            return
        lost = self.idle[: max(0, count - (free - len(self.idle)))]
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & self.owned
        assert all(0 <= block < self.pool.num_blocks for block in blocks)
        assert set(blocks) & set(self.idle) == set(lost), "blank blocks first, then the longest unused"
        self.lose(lost)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.share(blocks)
        self.held.append(list(blocks))

    @rule(keys=st.permutations(KEYS))
    def find_and_share(self, keys: list[bytes]) -> None:
        found = self.pool.find(keys)
        first_missing = next((i for i, key in enumerate(keys) if key not in self.kept), len(keys))
        assert found == [self.kept[key] for key in keys[:first_missing]]
        self.pool.share(found)
        self.held.append(found)
        self.idle = [block for block in self.idle if block not in found]

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def keep(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.owned)))
        self.pool.keep(block, key)
        if block not in self.kept.values():
            self.kept.setdefault(key, block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.forget(blocks)
        self.lose(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(blocks)
        self.idle += [block for block in reversed(blocks) if block not in self.owned and block in self.kept.values()]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def some_leave(self, data: st.DataObject) -> None:
        leaving = data.draw(st.sets(st.integers(0, len(self.held) - 1)))
        staying = {block for i, blocks in enumerate(self.held) if i not in leaving for block in blocks}
        assert self.pool.released_by([block for i in leaving for block in self.held[i]]) == self.owned - staying

    def lose(self, blocks: list[int]) -> None:
        self.kept = {key: block for key, block in self.kept.items() if block not in blocks}
        self.idle = [block for block in self.idle if block not in blocks]

    @property
    def owned(self) -> set[int]:
        return {block for blocks in self.held for block in blocks}

    @invariant()
    def every_block_is_free_or_owned(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.free_blocks == self.pool.num_blocks - len(self.owned)
            assert self.pool.kept_blocks == len(self.kept)
            assert {block for block in range(self.pool.num_blocks) if self.pool.is_owned(block)} == self.owned

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks in self.held:
                self.pool.free(blocks)
            assert sorted(self.pool.allocate(self.pool.num_blocks)) == list(range(self.pool.num_blocks))
            assert self.pool.kept_blocks == 0


TestOwners = Owners.TestCase
TestOwners.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


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


def test_a_kept_block_outlives_its_owner_until_its_room_is_needed() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.keep(blocks[0], b"begin")
    pool.keep(blocks[1], b"end")
    pool.free(blocks)
    assert (pool.free_blocks, pool.find([b"begin", b"end"])) == (3, blocks)
    pool.allocate(2)
    assert pool.find([b"begin", b"end"]) == blocks[:1], "a chain loses its end first"


def test_a_shared_block_counts_as_used_last() -> None:
    pool = BlockPool(2)
    for key in (b"older", b"newer"):
        [block] = pool.allocate(1)
        pool.keep(block, key)
        pool.free([block])
    again = pool.find([b"older"])
    pool.share(again)
    pool.free(again)
    pool.allocate(1)
    assert (pool.find([b"newer"]), pool.find([b"older"])) == ([], again)


def test_a_key_names_every_token_up_to_its_blocks_end() -> None:
    first = chain_key(b"", [1, 2])
    assert chain_key(first, [3, 4]) == chain_key(chain_key(b"", (1, 2)), (3, 4))
    chains = [(), (1, 2), (2, 1), (1, 2, 3, 4), (3, 4, 1, 2), (1, 2, 1, 2), (0, 0), (0, 0, 0, 0), (258, 0), (2, 1, 0, 0)]
    named = set()
    for chain in chains:
        key = b""
        for i in range(0, len(chain), 2):
            key = chain_key(key, chain[i : i + 2])
        named.add(key)
    assert len(named) == len(chains)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_a_begun_block_counts_whole(tokens: int, blocks: int) -> None:
    assert BlockPool(1, block_size=16).blocks_for(tokens) == blocks


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
