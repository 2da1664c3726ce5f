"""Random weights are the same whatever the number of ranks, and as varied as trained ones."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mixtral_worker.engine import Engine
from mixtral_worker.model import checkpoint, random_weights
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.parallel import Shard
from mixtral_worker.model.transformer import Transformer
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan

SHAPE = "dim=64,n_layers=2,n_heads=8,n_kv_heads=4,head_dim=8,hidden_dim=96,vocab_size=160"
MOE, DENSE = Path(f"random:{SHAPE}"), Path(f"random:{SHAPE},n_experts=1,experts_per_token=1")


def filled(spec: Path, shard: Shard) -> list[checkpoint.Part]:
    model = Transformer(ModelConfig.read(spec), shard)
    checkpoint.load(model, spec)
    return list(checkpoint.parts(model))


@pytest.mark.parametrize("spec", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("numbers_at_once", [2**20, 50])
def test_shares_of_all_ranks_make_the_tensors_of_one(spec: Path, numbers_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {part.name: part.place for part in filled(spec, Shard())}
    monkeypatch.setattr(random_weights, "NUMBERS_AT_ONCE", numbers_at_once)
    found = dict.fromkeys(whole, 0)
    for ep_size in (1, 2) if spec == MOE else (1,):
        for part in (part for index in range(4) for part in filled(spec, Shard(index, 4, ep_size=ep_size))):
            share = part.share(list(whole[part.name].shape))
            assert torch.equal(part.place, whole[part.name][tuple(slice(cut.start, cut.stop) for cut in share)]), part.name
            found[part.name] += 1
    assert min(found.values()) >= 4


def test_numbers_are_even_about_zero_and_differ_between_and_within_tensors() -> None:
    drawn = [torch.empty(300, 200) for _ in range(2)]
    for place, name in zip(drawn, ("layers.0.a", "layers.0.b"), strict=True):
        random_weights.fill(place, name=name, whole=[300, 200], share=[range(300), range(200)])
        assert abs(place.mean()) < 1e-3
        assert place.std().item() == pytest.approx(200**-0.5, rel=0.02)
        assert place.abs().max() <= (3 / 200) ** 0.5
        assert len(place.unique()) > 0.99 * place.numel()
        assert abs(torch.corrcoef(place).fill_diagonal_(0)).max() < 0.4, "no row repeats another"
    assert abs(torch.corrcoef(torch.stack([place.flatten() for place in drawn]))[0, 1]) < 0.02


def test_engine_with_random_weights_answers_as_differently_as_its_prompts() -> None:
    engine = Engine.load(MOE, max_slots=1, max_seq_len=32)
    answers = []
    for first in range(4):
        row = Row(0, 0, (first, 7, 9), (0,), True, 1, Sampling(0))
        answers.append(engine.logits(StepPlan(Kind.STEP, 1, (row,)))[0])
    assert all(logits.isfinite().all() and 0.5 < logits.std() < 2 for logits in answers)
    assert all((one - other).abs().max() > 0.5 for one, other in pairwise(answers))


def test_no_id_is_drawn_that_the_tokenizer_does_not_have() -> None:
    whole = Engine.load(MOE, max_slots=1, max_seq_len=32)
    cut = Engine.load(MOE, max_slots=1, max_seq_len=32, vocab_size=10)
    plans = [StepPlan(Kind.STEP, 1, (Row(0, 0, (5, 7), (0,), True, offset, Sampling(2.0, seed=3)),)) for offset in range(1, 60)]
    assert max(whole.step(plan)[0] for plan in plans) >= 10
    assert {cut.step(plan)[0] for plan in plans} <= set(range(10))
