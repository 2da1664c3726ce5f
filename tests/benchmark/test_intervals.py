"""Confidence intervals: they hold the truth as often as they say, and say nothing where a run is too short."""

from __future__ import annotations

import random

import pytest

from mixtral_benchmark.intervals import confidence, tokens_by_second
from mixtral_benchmark.measure import Arrival, Chat, figures


def chat(ttft_s: float, start_s: float = 0.0, tokens: int = 2, gap_s: float = 0.5) -> Chat:
    arrivals = [Arrival(start_s + ttft_s + i * gap_s, 1) for i in range(tokens)]
    return Chat(0, start_s, start_s, arrivals, ended_s=arrivals[-1].at_s, usage_tokens=tokens)


def test_interval_of_the_median_holds_the_true_median_about_as_often_as_it_says() -> None:
    held, runs = 0, 60
    for run in range(runs):
        draw = random.Random(run)
        low, high = confidence([chat(draw.expovariate(1.0)) for _ in range(80)])["median_ttft_ms"]
        held += low <= 693.1 <= high  # ln 2 seconds
    assert held >= 0.85 * runs


def test_interval_holds_its_figure_and_is_the_same_again() -> None:
    draw = random.Random(1)
    chats = [chat(draw.uniform(0.1, 2.0), tokens=draw.randrange(2, 9), gap_s=draw.uniform(0.1, 0.3)) for _ in range(50)]
    measured, intervals = figures(chats, 0.0, 10.0), confidence(chats)
    assert intervals == confidence(chats)
    for name in ("median_ttft_ms", "mean_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "mean_e2el_ms", "median_chat_tokens_per_s"):
        low, high = intervals[name]
        assert low <= (measured[name] or 0) <= high


def test_values_all_alike_leave_no_doubt() -> None:
    low, high = confidence([chat(0.25) for _ in range(20)])["median_ttft_ms"]
    assert (low, high) == (250.0, 250.0)


def test_few_chats_have_no_interval_and_failed_ones_do_not_count() -> None:
    assert confidence([chat(0.1) for _ in range(9)]) == {}
    unended = [Chat(i, 0.0, 0.0, [Arrival(1.0, 1)]) for i in range(50)]
    assert confidence(unended) == {}


def test_throughput_has_an_interval_from_ten_steady_seconds_on() -> None:
    def steady(seconds: int) -> list[Chat]:
        return [chat(0.0, tokens=seconds * 10 + 1, gap_s=0.1) for _ in range(4)]

    assert "steady_output_throughput" not in confidence(steady(8))
    low, high = confidence(steady(12))["steady_output_throughput"]
    assert low == pytest.approx(40, rel=0.05)
    assert high == pytest.approx(40, rel=0.05)


def test_seconds_hold_every_token_of_the_window_but_those_that_opened_it() -> None:
    chats = [chat(0.0, tokens=31, gap_s=0.125), chat(0.0, tokens=31, gap_s=0.125)]
    assert tokens_by_second(chats) == [16, 16, 16]
    assert tokens_by_second([]) == []
