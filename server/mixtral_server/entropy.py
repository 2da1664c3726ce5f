"""Random bytes for ids and seeds, from the operating system's source, drawn for many at once: a system call for each takes longer than all
else of an id."""

from __future__ import annotations

import os

_DRAWN = 4096


class Entropy:
    """Each byte is handed out once; one object per process."""

    def __init__(self) -> None:
        self._bytes = b""
        self._at = 0

    def take(self, count: int) -> bytes:
        """count: up to 4,096."""
        if self._at + count > len(self._bytes):
            self._bytes, self._at = os.urandom(_DRAWN), 0
        self._at += count
        return self._bytes[self._at - count : self._at]

    def forget(self) -> None:
        self._bytes, self._at = b"", 0


_of_this_process = Entropy()
os.register_at_fork(after_in_child=_of_this_process.forget)


def token_hex(count: int) -> str:
    """As secrets.token_hex: 2 * count hexadecimal digits."""
    return _of_this_process.take(count).hex()


def random_int(bits: int) -> int:
    """0 to 2**bits - 1, each as likely as the others."""
    count = -(-bits // 8)
    return int.from_bytes(_of_this_process.take(count)) >> (8 * count - bits)
