"""Tokens go through the experts their router likes best, weighed as the formula says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.moe import MoE, route
from mixtral_worker.model.parallel import Shard

CONFIG = ModelConfig(32, 1, 4, 2, 8, 24, 64, 6, 2)


def filled(config: ModelConfig) -> MoE:
    moe, generator = MoE(config, Shard()), torch.Generator().manual_seed(0)
    for weight in moe.parameters():
        weight.data.normal_(0, 0.3, generator=generator)
    return moe


def plain(moe: MoE, x: Tensor, experts_per_token: int) -> Tensor:
    """One token and one expert at a time."""
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        shares = (moe.gate @ token).softmax(-1)
        chosen = sorted(range(len(shares)), key=lambda e: (-float(shares[e]), e))[:experts_per_token]
        for e in chosen:
            w1, w3 = moe.w13[e].chunk(2)
            out[t] += shares[e] / shares[chosen].sum() * (moe.w2[e] @ (F.silu(w1 @ token) * (w3 @ token)))
    return out


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_output_equals_one_token_and_one_expert_at_a_time(tokens: int) -> None:
    moe = filled(CONFIG)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    torch.testing.assert_close(moe(x), plain(moe, x, 2), rtol=0, atol=1e-5)


def test_all_tokens_may_choose_the_same_experts() -> None:
    moe = filled(CONFIG)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(5)).repeat(9, 1)
    torch.testing.assert_close(moe(x), plain(moe, x, 2), rtol=0, atol=1e-5)


def test_of_equal_experts_the_lower_index_is_chosen() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 3.0, 0.0, 0.0]])
    weights, experts = route(logits, 2)
    assert experts.tolist() == [[1, 2], [0, 1], [1, 0]]
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))


def test_weights_are_a_softmax_over_all_experts_scaled_to_one() -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)) * 3
    weights, experts = route(logits, 2)
    of_all = logits.softmax(-1).gather(1, experts)
    torch.testing.assert_close(weights, of_all / of_all.sum(-1, keepdim=True))


def test_router_decides_in_float32() -> None:
    logits = torch.tensor([[1.0, 1.0 + 2**-12]])
    assert route(logits, 1)[1].tolist() == [[1]]
    assert logits.bfloat16()[0, 0] == logits.bfloat16()[0, 1]


def test_nan_of_one_token_stays_its_own() -> None:
    moe = filled(CONFIG)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    expected = moe(x)
    x[2] = torch.nan
    out = moe(x)
    assert out[2].isnan().all()
    torch.testing.assert_close(out[[0, 1, 3]], expected[[0, 1, 3]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_all_experts_in_one_product_equal_one_after_another(tokens: int) -> None:
    moe = filled(CONFIG)
    generator = torch.Generator().manual_seed(tokens)
    ends = torch.randint(6, (tokens,), generator=generator).bincount(minlength=6).cumsum(0)
    x = torch.randn(tokens, 32, generator=generator)
    torch.testing.assert_close(moe.compute_grouped(x, ends), moe.compute_each(x, ends), rtol=0, atol=1e-5)
