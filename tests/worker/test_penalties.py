"""What a job's own tokens and wishes do to its logits: as transformers and OpenAI define it, to that job alone."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from mixtral_worker.penalties import steer
from mixtral_worker.plan import Sampling
from mixtral_worker.sampling import LEAST_CHANCE, NOT_FINITE, sample
from mixtral_worker.steering import Steering, Wishes

VOCAB = 40
EOS = 2
UNTIMED = settings(deadline=None, max_examples=60)

ids = st.integers(0, VOCAB - 1)
tokens = st.lists(ids, max_size=30)
wishes = st.builds(
    Wishes,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 2.0, -0.3]),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100, width=16), max_size=5).map(lambda bias: tuple(bias.items())),
    min_tokens=st.sampled_from([0, 5, 30]),
    end_ids=st.just((EOS, 7)),
    top_logprobs=st.none() | st.integers(0, 20),
)
jobs = st.tuples(wishes, tokens, tokens)


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def steered(logits: Tensor, *rows: Steering) -> Tensor:
    changed = logits.clone()
    assert steer(changed, list(enumerate(rows))) == []
    return changed


def plain(row: list[float], wish: Wishes, prompt: list[int], produced: list[int]) -> list[float]:
    """The definitions, one token at a time."""
    made = Counter(produced)
    for token, bias in wish.logit_bias:
        row[token] += bias
    for token in {*prompt, *produced}:
        row[token] = row[token] / wish.repetition_penalty if row[token] > 0 else row[token] * wish.repetition_penalty
        row[token] -= made[token] * wish.frequency_penalty + (made[token] > 0) * wish.presence_penalty
    for token in wish.end_ids if len(produced) < wish.min_tokens else ():
        row[token] = -math.inf
    return row


@UNTIMED
@given(st.lists(jobs, min_size=1, max_size=6))
def test_every_row_gets_its_own_wishes_as_defined(batch: list[tuple[Wishes, list[int], list[int]]]) -> None:
    logits = random_logits(len(batch))
    expected = [plain(row, *job) for row, job in zip(logits.tolist(), batch, strict=True)]
    changed = steered(logits, *(Steering(*job) for job in batch))
    torch.testing.assert_close(changed, torch.tensor(expected), rtol=1e-5, atol=1e-4)


@UNTIMED
@given(
    prompt=st.lists(ids, min_size=1, max_size=30),
    produced=tokens,
    penalty=st.sampled_from([0.5, 1.2, 3.0]),
    bias=st.dictionaries(ids, st.floats(-50, 50, width=16), min_size=1, max_size=4),
    min_tokens=st.integers(1, 30),
)
def test_repetition_penalty_bias_and_min_tokens_are_transformers(
    prompt: list[int], produced: list[int], penalty: float, bias: dict[int, float], min_tokens: int
) -> None:
    theirs = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], float(value)] for token, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(penalty),
            MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, EOS, device="cpu"),
        ]
    )
    logits = random_logits(1)
    wish = Wishes(repetition_penalty=penalty, logit_bias=tuple(bias.items()), min_tokens=min_tokens, end_ids=(EOS,))
    expected = theirs(torch.tensor([[*prompt, *produced]]), logits.clone())
    torch.testing.assert_close(steered(logits, Steering(wish, prompt, produced)), expected)


@UNTIMED
@given(wishes, tokens, tokens, st.data())
def test_a_job_that_moved_is_steered_as_one_that_stayed(wish: Wishes, prompt: list[int], answer: list[int], data: st.DataObject) -> None:
    stayed_ids: list[int] = []
    stayed = Steering(wish, prompt, stayed_ids)
    logits = random_logits(1)
    looks = data.draw(st.lists(st.integers(0, len(answer)), max_size=4).map(sorted))
    for before, now in itertools.pairwise([0, *looks, len(answer)]):
        stayed_ids += answer[before:now]
        moved = Steering(wish, prompt, answer[:now])
        assert torch.equal(steered(logits, stayed), steered(logits, moved))


def test_rows_that_ask_for_nothing_are_left_as_they_are_beside_one_that_does() -> None:
    logits = random_logits(3)
    settings = [Sampling(0.9, 0.9, 20, seed) for seed in (1, 2, 3)]
    alone = sample(logits.clone(), settings, [4, 5, 6]).tolist()
    wish = Wishes(2.0, 1.0, 1.0, ((3, 50.0),), 10, (EOS,), 5)
    both = sample(changed := logits.clone(), settings, [4, 5, 6], [(1, Steering(wish, [1, 2], [3, 4]))]).tolist()
    assert both[::2] == alone[::2]
    assert both[1] == 3
    assert torch.equal(changed[::2], logits[::2])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_row_that_is_not_finite_fails_alone_whatever_steers_it(broken: float) -> None:
    logits = random_logits(3)
    wish = Wishes(2.0, 1.0, 1.0, ((3, 50.0),), 10, (EOS,), 5)
    rows = [Steering(wish, [1], [2]) for _ in range(3)]
    settings = [Sampling(0.8, seed=9)] * 3
    whole = sample(logits.clone(), settings, [1, 1, 1], list(enumerate(rows))).tolist()
    logits[1, 5] = broken
    assert sample(logits, settings, [1, 1, 1], list(enumerate(rows))).tolist() == [whole[0], NOT_FINITE, whole[2]]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_the_models_own_before_temperature_and_penalties(temperature: float) -> None:
    logits = random_logits(3)
    rows = [Steering(Wishes(repetition_penalty=5.0, top_logprobs=count), [1, 2, 3], [4]) for count in (0, 3, 20)]
    expected = logits.log_softmax(-1)
    drawn = sample(logits.clone(), [Sampling(temperature, seed=3)] * 3, [2, 2, 2], list(enumerate(rows))).tolist()
    for row, count, token, own in zip(rows, (0, 3, 20), drawn, expected, strict=True):
        best = own.topk(count)
        assert row.chances is not None
        assert row.chances.drawn == pytest.approx(own[token].item(), abs=1e-5)
        assert [token for token, _ in row.chances.top] == best.indices.tolist()
        assert [chance for _, chance in row.chances.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_logprob_out_of_reach_is_a_number_that_json_has() -> None:
    logits = torch.full((1, VOCAB), -2e4)
    logits[0, 1] = 0.0
    row = Steering(Wishes(logit_bias=((1, -100.0), (3, 100.0)), top_logprobs=2), [], [])
    logits[0, 3] = -150.0
    assert sample(logits, [Sampling(0)], [1], [(0, row)]).tolist() == [3]
    assert row.chances is not None
    assert row.chances.drawn == pytest.approx(-150)
    assert row.chances.top[0] == (1, 0.0)
    logits = torch.full((1, VOCAB), -2e4)
    logits[0, 1] = 0.0
    sample(logits, [Sampling(0)], [1], [(0, row)])
    assert row.chances.top[1][1] == LEAST_CHANCE
