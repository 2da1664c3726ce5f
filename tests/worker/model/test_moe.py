"""Tokens go through the experts their router likes best, weighed as the formula says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.moe import MoE, route
from mixtral_worker.model.parallel import Shard

CONFIG = ModelConfig(32, 1, 4, 2, 8, 24, 64, 6, 2)


def filled(config: ModelConfig, shard: Shard | None = None) -> MoE:
    moe, generator = MoE(config, shard or Shard()), torch.Generator().manual_seed(0)
    for weight in moe.parameters():
        weight.data.normal_(0, 0.3, generator=generator)
    return moe


def plain(moe: MoE, x: Tensor, experts_per_token: int, *, scaled: bool = True) -> Tensor:
    """One token and one expert at a time."""
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        shares = (moe.gate @ token).softmax(-1)
        chosen = sorted(range(len(shares)), key=lambda e: (-float(shares[e]), e))[:experts_per_token]
        for e in chosen:
            w1, w3 = moe.w13[e].chunk(2)
            out[t] += shares[e] / (shares[chosen].sum() if scaled else 1) * (moe.w2[e] @ (F.silu(w1 @ token) * (w3 @ token)))
    return out


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_output_equals_one_token_and_one_expert_at_a_time(tokens: int) -> None:
    moe = filled(CONFIG)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    torch.testing.assert_close(moe(x), plain(moe, x, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7])
def test_without_normalization_the_weights_are_those_of_the_softmax_over_all_experts(tokens: int) -> None:
    moe = filled(replace(CONFIG, moe_normalization_mode="none"))
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    torch.testing.assert_close(moe(x), plain(moe, x, 2, scaled=False), rtol=0, atol=1e-5)
    assert (moe.choose(x)[0].sum(-1) < 1).all()


class AloneForNow(Shard):
    """A part whose sum over the ranks the test makes itself."""

    def sum(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize(("count", "ep_size"), [(2, 1), (2, 2), (3, 3), (4, 2), (6, 6)])
@pytest.mark.parametrize("grouped", [False, True], ids=["each", "grouped"])
def test_parts_of_all_ranks_add_up_to_the_whole(
    count: int, ep_size: int, tokens: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if grouped:
        monkeypatch.setattr(MoE, "_one_after_another", MoE._all_at_once)
    whole, total = filled(CONFIG), torch.zeros(tokens, 32)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    for index in range(count):
        shard = AloneForNow(index, count, ep_size=ep_size)
        part, slices = MoE(CONFIG, shard), shard.of_expert
        part.gate.copy_(whole.gate)
        for place, expert in enumerate(part.experts):
            part.w13[place] = torch.cat([half.chunk(slices.count)[slices.index] for half in whole.w13[expert].chunk(2)])
            part.w2[place] = whole.w2[expert].chunk(slices.count, dim=1)[slices.index]
        total += part(x)
    torch.testing.assert_close(total, whole(x), rtol=0, atol=1e-5)


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
    torch.testing.assert_close(moe._all_at_once(x, ends), moe._one_after_another(x, ends), rtol=0, atol=1e-5)
