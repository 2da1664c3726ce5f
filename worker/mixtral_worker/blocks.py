"""Who owns which KV block, and what the blocks without an owner still hold.

A block is the room for `block_size` consecutive positions of one sequence, in every layer. The pool hands blocks out, counts
their owners, and takes them back when the last owner lets go. A full block can be kept under a key that names every token up to its
end: sequences that begin with the same tokens share it, and it stays after its last owner until its room is needed, least recently
used first. Where the tensors lie is kv_cache.py's, who waits for blocks and which are worth keeping is scheduler.py's.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

BLOCK_SIZE = 16


class OutOfBlocks(Exception):
    """More blocks were asked for than are free."""


def chain_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block: names its tokens and, by the key of the block before (b"" for the first), all tokens ahead of them."""
    # A cryptographic hash: two chats with one key would read each other's content, so nobody may be able to make such a pair.
    return blake2b(before + array("i", tokens).tobytes(), digest_size=32).digest()


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of at least one token; given {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._owners = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is still warm in the processor's cache
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept blocks without an owner, least recently used first
        self._keys: list[bytes | None] = [None] * num_blocks
        self._kept: dict[bytes, int] = {}  # key → block

    @property
    def free_blocks(self) -> int:
        """Blocks without an owner; those whose content is kept are given out last."""
        return len(self._blank) + len(self._idle)

    @property
    def kept_blocks(self) -> int:
        """Blocks that a sequence with the same tokens could share, with and without an owner."""
        return len(self._kept)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, all or none; what was kept in them is forgotten. Raises OutOfBlocks."""
        if count > self.free_blocks:
            raise OutOfBlocks(f"{count} blocks asked for; {self.free_blocks} of {self.num_blocks} are free")
        taken = [self._blank.pop() if self._blank else self._idle.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._owners[block] = 1
        self.forget(taken)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each of these blocks, which are owned or kept."""
        for block in blocks:
            if block in self._idle:
                del self._idle[block]
            else:
                self._require_owned(block)
            self._owners[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Take one owner from each of these blocks; a block without owners is free again."""
        for block in reversed(blocks):  # a chain is found from its beginning on, so its end is the first to be given out anew
            self._require_owned(block)
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if self._keys[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    def keep(self, block: int, key: bytes) -> None:
        """Let others find this block, which is full and whose content no longer changes. Of two with one key the first is found."""
        self._require_owned(block)
        if self._keys[block] is None and key not in self._kept:
            self._keys[block] = key
            self._kept[key] = block

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The kept blocks of these keys, up to the first that is not there. They are safe from eviction once shared."""
        found = []
        for key in keys:
            block = self._kept.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody find these blocks any more. Their owners keep them."""
        for block in blocks:
            self._require_owned(block)
            key = self._keys[block]
            if key is not None:
                self._keys[block] = None
                del self._kept[key]

    def is_owned(self, block: int) -> bool:
        return self._owners[block] > 0

    def released_by(self, blocks: Iterable[int]) -> set[int]:
        """The blocks that would be free if one owner let go of each of these."""
        return {block for block, leaving in Counter(blocks).items() if self._owners[block] == leaving}

    def _require_owned(self, block: int) -> None:
        if self._owners[block] < 1:
            raise ValueError(f"block {block} has no owner; only blocks handed out by allocate can be shared, kept or freed")
