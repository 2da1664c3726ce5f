"""Draws follow the softmax, and depend on seed, offset and logits alone."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mixtral_worker.sampling import FIRST_CANDIDATES, NOT_FINITE, Sampling, gumbel, sample

VOCAB = 300
PLAUSIBLE = 1e-6  # a fair draw fails a chi-square test at this level once in a million; seeds are fixed


def random_logits(rows: int, vocab: int = VOCAB, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def draws(logits: Tensor, setting: Sampling, count: int) -> Tensor:
    """The ids of one job at offsets 1 … count if its logits never changed."""
    return sample(logits.expand(count, -1), [setting] * count, range(1, count + 1))


def chi_square_limit(freedom: int) -> float:
    """The value that chi-square passes with probability PLAUSIBLE (Wilson and Hilferty 1931)."""
    z = 4.753424  # of the normal distribution at PLAUSIBLE
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(ids: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * len(ids)
    assert expected.min() > 5
    observed = torch.bincount(ids, minlength=len(expected))
    return float(((observed - expected) ** 2 / expected).sum())


# The reference: one row, one token at a time, in Python's own numbers.


def mix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def plain_gumbel(seed: int, offset: int, token: int) -> float:
    key = mix64((mix64((seed + 0x9E3779B97F4A7C15) % 2**64) + offset) % 2**64)
    x = (key + token * 0x9E3779B9) % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = ((x ^ x >> 15) + (key >> 32)) * 0x846CA68B % 2**32
    x ^= x >> 16
    uniform = (x % 2**31 + 0.5) / 2**31
    return -math.log(-math.log1p(-uniform))


def plain_sample(logits: Sequence[float], setting: Sampling, offset: int) -> tuple[int, float]:
    """The drawn id, and by how much it won."""
    if setting.temperature == 0:
        scores = dict(enumerate(logits))
    else:
        scores = {token: logit / setting.temperature for token, logit in enumerate(logits)}
        least = max(scores.values()) + math.log(setting.min_p or 1e-300)
        scores = {token: score for token, score in scores.items() if score >= least}
        ranked = sorted(scores.values(), reverse=True)[: setting.top_k or None]
        weights = [math.exp(score - ranked[0]) for score in ranked]
        kept, reached = 0, 0.0
        while kept < len(ranked) and (setting.top_p == 1 or reached < setting.top_p * sum(weights)):
            reached += weights[kept]
            kept += 1
        scores = {token: s + plain_gumbel(setting.seed, offset, token) for token, s in scores.items() if s >= ranked[kept - 1]}
    best = max(scores, key=lambda token: (scores[token], -token))
    rest = [score for token, score in scores.items() if token != best]
    return best, scores[best] - max(rest, default=-math.inf)


sampling_settings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 200, 1000]),
    seed=st.integers(-(2**63), 2**63 - 1),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(sampling_settings, st.integers(1, 40_000), st.integers(0, 2**32)), min_size=1, max_size=6), st.floats(0.01, 8))
def test_draws_equal_a_plain_reference_for_any_settings(jobs: list[tuple[Sampling, int, int]], spread: float) -> None:
    logits = torch.cat([random_logits(1, spread=spread, seed=seed) for _, _, seed in jobs])
    ids = sample(logits, [setting for setting, _, _ in jobs], [offset for _, offset, _ in jobs])
    for row, got, (setting, offset, _) in zip(logits.tolist(), ids.tolist(), jobs, strict=True):
        expected, margin = plain_sample(row, setting, offset)
        assert got == expected or margin < 1e-4


def test_noise_equals_the_plain_hash() -> None:
    seeds, offsets = [0, 1, -1, 2**63 - 1, -(2**63)], [1, 2, 3, 500, 2**31]
    noise = gumbel(torch.tensor(seeds), torch.tensor(offsets), 1000)
    expected = [[plain_gumbel(seed, offset, token) for token in range(1000)] for seed, offset in zip(seeds, offsets, strict=True)]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = random_logits(1, vocab=20, spread=1.0, seed=3)[0]
    ids = draws(logits, Sampling(temperature, seed=11), 60_000)
    assert chi_square(ids, (logits / temperature).softmax(-1)) < chi_square_limit(19)


def test_first_draws_of_many_seeds_follow_the_softmax() -> None:
    logits = random_logits(1, vocab=20, spread=1.0, seed=3)[0]
    ids = sample(logits.expand(60_000, -1), [Sampling(1.0, seed=seed) for seed in range(60_000)], [1] * 60_000)
    assert chi_square(ids, logits.softmax(-1)) < chi_square_limit(19)


@pytest.mark.parametrize("lag", [1, 2, 256])
def test_draws_at_different_offsets_are_independent(lag: int) -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    ids = draws(probabilities.log(), Sampling(1.0, seed=5), 80_000 + lag)
    pairs = ids[:-lag] * 4 + ids[lag:]
    assert chi_square(pairs, torch.outer(probabilities, probabilities).flatten()) < chi_square_limit(15)


def test_noise_of_neighbouring_tokens_seeds_and_offsets_is_uncorrelated() -> None:
    seeds, offsets = torch.arange(40).repeat_interleave(40), torch.arange(1, 41).repeat(40)
    noise = gumbel(seeds, offsets, 1000).view(40, 40, 1000)
    noise = (noise - noise.mean()) / noise.std()
    for dim in range(3):
        size = noise.shape[dim] - 1
        correlation = float((noise.narrow(dim, 0, size) * noise.narrow(dim, 1, size)).mean())
        assert abs(correlation) < 5 / math.sqrt(noise.numel())


@pytest.mark.parametrize(
    ("setting", "kept"), [(Sampling(1.0, top_k=3), 3), (Sampling(1.0, top_p=0.75), 2), (Sampling(1.0, top_k=3, top_p=0.8), 2)]
)
def test_draws_follow_the_softmax_of_the_kept_candidates_alone(setting: Sampling, kept: int) -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    ids = draws(probabilities.log(), setting, 30_000)
    assert int(ids.max()) == kept - 1
    assert chi_square(ids, probabilities[:kept] / probabilities[:kept].sum()) < chi_square_limit(kept - 1)


def test_draw_depends_on_no_other_row_and_no_place_in_the_batch() -> None:
    rng = random.Random(2)
    choices = [Sampling(0), Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.8), Sampling(0.9, top_k=70, top_p=0.5)]
    logits = random_logits(32)
    jobs = [Sampling(s.temperature, s.top_p, s.top_k, rng.getrandbits(60)) for s in rng.choices(choices, k=32)]
    offsets = [rng.randrange(1, 5000) for _ in jobs]
    alone = [int(sample(logits[i : i + 1], [jobs[i]], [offsets[i]])) for i in range(32)]
    for size in (2, 7, 32):
        for _ in range(5):
            rows = rng.sample(range(32), size)
            ids = sample(logits[rows], [jobs[i] for i in rows], [offsets[i] for i in rows])
            assert ids.tolist() == [alone[i] for i in rows]


def test_temperature_zero_takes_the_lowest_id_of_the_best() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert sample(logits, [Sampling(0, seed=8)] * 2, [1, 2]).tolist() == [1, 0]
    assert sample(logits, [Sampling(0, top_k=2, top_p=0.1), Sampling(0)], [1, 2]).tolist() == [1, 0]


def test_a_temperature_near_zero_takes_the_best() -> None:
    assert draws(torch.tensor([1.0, 1.1, 0.5]), Sampling(1e-30), 200).unique().tolist() == [1]


def test_equals_of_the_last_kept_candidate_stay() -> None:
    assert draws(torch.tensor([2.0, 1.0, 1.0, 0.0]), Sampling(2.0, top_k=2), 300).unique().tolist() == [0, 1, 2]


def test_nucleus_wider_than_the_first_candidates_is_kept_whole() -> None:
    flat = torch.linspace(0.01, 0, VOCAB)
    assert FIRST_CANDIDATES < VOCAB // 2
    ids = draws(flat, Sampling(1.0, top_p=0.99999), 6000)
    assert len(ids.unique()) == VOCAB


@pytest.mark.parametrize(
    ("setting", "theirs"),
    [
        (Sampling(0.7, min_p=0.1), [TemperatureLogitsWarper(0.7), MinPLogitsWarper(0.1)]),
        (Sampling(1.6, top_k=7), [TemperatureLogitsWarper(1.6), TopKLogitsWarper(7)]),
        (Sampling(1.3, top_p=0.8), [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.8)]),
        (
            Sampling(1.3, 0.8, 30, 0, 0.02),
            [TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.02), TopKLogitsWarper(30), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_the_kept_candidates_are_transformers(setting: Sampling, theirs: list[LogitsProcessor]) -> None:
    logits = random_logits(1, spread=1.0)
    kept = LogitsProcessorList(theirs)(torch.tensor([[0]]), logits.clone())[0]
    ids = draws(logits[0], setting, 20_000).unique().tolist()
    assert set(ids) <= set(kept.isfinite().nonzero()[:, 0].tolist())
    likely = (kept.softmax(-1) * 20_000 > 30).nonzero()[:, 0].tolist()
    assert set(likely) <= set(ids)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("setting", [Sampling(0), Sampling(1.0), Sampling(1.0, top_k=4), Sampling(1.0, top_p=0.5)])
def test_row_that_is_not_finite_is_reported_and_spoils_no_other(broken: float, setting: Sampling) -> None:
    logits = random_logits(3)
    expected = sample(logits, [setting] * 3, [4, 5, 6]).tolist()
    logits[1, 17] = broken
    assert sample(logits, [setting] * 3, [4, 5, 6]).tolist() == [expected[0], NOT_FINITE, expected[2]]


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(2)
    before = logits.clone()
    sample(logits, [Sampling(0.5, top_k=3), Sampling(0)], [1, 1])
    assert torch.equal(logits, before)
