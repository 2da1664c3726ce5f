"""Neighbouring numbers of a head turn together, by an angle that grows with the position."""

import math

import pytest
import torch

from mixtral_worker.model.rope import rotate_, rotations


def plain(head: list[float], position: int, theta: float) -> list[float]:
    turned = []
    for i in range(0, len(head), 2):
        angle = position * theta ** (-i / len(head))
        cos, sin = math.cos(angle), math.sin(angle)
        turned += [head[i] * cos - head[i + 1] * sin, head[i] * sin + head[i + 1] * cos]
    return turned


@pytest.mark.parametrize("position", [0, 1, 7, 32_767])
def test_each_pair_turns_by_the_formula(position: int) -> None:
    heads = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(position))
    expected = torch.tensor([[plain(head, position, 1e6) for head in heads[0].tolist()]])
    rotate_(heads, rotations(torch.tensor([position]), 8, 1e6))
    torch.testing.assert_close(heads, expected, rtol=0, atol=1e-5)


def test_products_of_two_positions_depend_on_their_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 1, 16, generator=generator), torch.randn(1, 1, 16, generator=generator)

    def product(of_query: int, of_key: int) -> torch.Tensor:
        q, k = query.clone(), key.clone()
        rotate_(q, rotations(torch.tensor([of_query]), 16, 1e4))
        rotate_(k, rotations(torch.tensor([of_key]), 16, 1e4))
        return (q * k).sum()

    torch.testing.assert_close(product(9, 4), product(1009, 1004), rtol=0, atol=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_part_of_a_tensor_turns_in_place_and_the_rest_stays(dtype: torch.dtype) -> None:
    whole = torch.ones(2, 4, 8, dtype=dtype)
    rotate_(whole[:, :3], rotations(torch.tensor([3, 5]), 8, 1e4))
    assert (whole[:, 3] == 1).all()
    assert (whole[:, :3] != 1).any(-1).all()
    torch.testing.assert_close(whole[:, :3].float().norm(dim=-1), torch.full((2, 3), math.sqrt(8)), rtol=1e-2, atol=0)
