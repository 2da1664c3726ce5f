"""The moments of an open loop: repeatable, rising, with the rate and the spread that were asked for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_benchmark.arrivals import CONSTANT, Pace, moments_s

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
rates = st.floats(0.01, 1000)
paces = st.builds(Pace, rates, st.one_of(st.floats(0.1, 20), st.just(CONSTANT)), st.one_of(st.none(), rates))


def spread(gaps: list[float]) -> tuple[float, float]:
    mean = math.fsum(gaps) / len(gaps)
    return mean, math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps))


@UNTIMED
@given(st.integers(1, 200), paces, st.integers(0, 2**32))
def test_moments_begin_at_0_rise_and_repeat_with_their_seed(count: int, pace: Pace, seed: int) -> None:
    moments = moments_s(count, pace, seed)
    assert len(moments) == count
    assert moments[0] == 0
    assert moments == sorted(moments)
    assert moments == moments_s(count, pace, seed)


def test_different_seeds_give_different_moments() -> None:
    assert moments_s(10, Pace(1.0), 0) != moments_s(10, Pace(1.0), 1)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_their_rate_and_the_spread_of_their_burstiness(burstiness: float) -> None:
    moments = moments_s(40_001, Pace(4.0, burstiness), seed=1)
    mean, deviation = spread([after - before for before, after in pairwise(moments)])
    assert mean == pytest.approx(0.25, rel=0.03)
    assert deviation / mean == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_constant_gaps_are_all_alike() -> None:
    assert moments_s(4, Pace(2.0, CONSTANT), seed=1) == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(("first", "last"), [(1.0, 9.0), (9.0, 1.0)])
def test_ramp_goes_in_a_straight_line_from_one_rate_to_the_other(first: float, last: float) -> None:
    count = 10_000
    moments = moments_s(count, Pace(first, CONSTANT, last), seed=0)
    duration_s = 2 * count / (first + last)
    assert moments[-1] == pytest.approx(duration_s, rel=0.01)
    for share in (0.1, 0.5, 0.9):
        at_s = share * duration_s
        sent = sum(at_s - 5 <= moment < at_s + 5 for moment in moments)
        assert sent / 10 == pytest.approx(first + (last - first) * share, rel=0.03)


def test_ramp_to_the_same_rate_is_no_ramp() -> None:
    assert moments_s(50, Pace(3.0, 1.0, 3.0), 7) == moments_s(50, Pace(3.0), 7)
