"""Weights for tests and benchmarks where there is no checkpoint: each number a hash of its tensor's name and its place in the tensor.

So every rank makes its own share, the whole is the same over any number of ranks and on any device, and no file is read. The hash is the
mixer lowbias32 (Wellons 2018), half of a tensor's key entering before its first round and half before its second.
"""

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor

NUMBERS_AT_ONCE = 2**20


def fill(place: Tensor, *, name: str, whole: Sequence[int], share: Sequence[range]) -> None:
    """Set place to the share of the tensor of this name and whole shape: norms to one, others even about 0, each output's variance 1."""
    if len(whole) == 1:
        place.fill_(1)
        return
    spread = (3 if name.startswith("tok_embeddings") else 3 / whole[1]) ** 0.5
    columns = torch.arange(share[1].start, share[1].stop, dtype=torch.int32, device=place.device)
    rows_at_once = max(1, NUMBERS_AT_ONCE // len(columns))
    for first in range(0, len(share[0]), rows_at_once):
        target = place[first : first + rows_at_once]
        rows = torch.arange(len(target), dtype=torch.int32, device=place.device) + (share[0].start + first)
        target.copy_(_even(rows[:, None] * whole[1] + columns, name).mul_(spread))


def _even(places: Tensor, name: str) -> Tensor:
    """int32 places → float32 numbers spread evenly from -1 to 1."""
    key = sha256(name.encode()).digest()
    x = places.mul_(_signed(0x9E3779B9)).add_(_word(key[:4]))
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x += _word(key[4:8])
    x *= _signed(0x846CA68B)
    return x.float().mul_(2**-31)


def _word(key: bytes) -> int:
    return int.from_bytes(key, "little", signed=True)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
