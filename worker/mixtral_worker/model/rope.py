"""Rotary positions as Mistral's own checkpoints want them: neighbouring numbers (2i, 2i + 1) of a head form a pair.

Checkpoints of Hugging Face permute wq and wk so that pairs lie half a head apart; those do not belong here.
"""

import torch
from torch import Tensor


def rotations(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """The turn of each pair at each position. positions [T] → complex64 [T, D / 2]."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * theta ** (-pair / head_dim)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate_(heads: Tensor, rotation: Tensor) -> None:
    """Turn every head in place. heads [T, H, D], rotation [T, D / 2]."""
    exact = heads.float()  # heads itself where it is float32 already
    pairs = torch.view_as_complex(exact.view(*exact.shape[:-1], -1, 2))
    pairs.mul_(rotation[:, None])
    if exact is not heads:
        heads.copy_(exact)
