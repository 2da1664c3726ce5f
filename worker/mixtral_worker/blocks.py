"""Who owns which KV block.

A block is the room for `block_size` consecutive positions of one sequence, in every layer. The pool hands blocks out, counts
their owners, and takes them back when the last owner lets go. Where the tensors lie is kv_cache.py's, who waits for blocks is
scheduler.py's.
"""

from collections.abc import Iterable

BLOCK_SIZE = 16


class OutOfBlocks(Exception):
    """More blocks were asked for than are free."""


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of at least one token; given {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is still warm in the processor's cache
        self._owners = [0] * num_blocks

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, all or none. Raises OutOfBlocks."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked for; {len(self._free)} of {self.num_blocks} are free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._owners[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each of these blocks."""
        for block in blocks:
            self._require_owned(block)
            self._owners[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take one owner from each of these blocks; a block without owners is free again."""
        for block in blocks:
            self._require_owned(block)
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free.append(block)

    def _require_owned(self, block: int) -> None:
        if self._owners[block] < 1:
            raise ValueError(f"block {block} has no owner; only blocks handed out by allocate can be shared or freed")
