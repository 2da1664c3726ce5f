"""The definitions: what each figure is, held against plain ones."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_benchmark.measure import (
    STEADY_SHARE,
    Arrival,
    Chat,
    Failure,
    distribution,
    figures,
    frame_gaps_s,
    frames,
    latencies_s,
    peak_overlap,
    percentile,
    scheduled_e2e_s,
    scheduled_ttft_s,
    steady_throughput,
    steady_window,
    token_gaps_s,
    tokens_per_s,
    tpot_s,
    ttft_s,
)

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# Quarters are exact in binary, so that sums and differences of times are too.
MOMENTS = st.integers(0, 4000).map(lambda quarters: quarters / 4)
VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=60).map(sorted)
SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda pair: (float(pair[0]), float(sum(pair)))), max_size=20)


@st.composite
def arrival_lists(draw: st.DrawFn, min_size: int = 0) -> list[Arrival]:
    moments = sorted(draw(st.lists(MOMENTS, min_size=min_size, max_size=20)))
    return [Arrival(at_s, draw(st.integers(1, 5))) for at_s in moments]


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    """A chat of any fate: completed, failed early or late, interrupted."""
    arrivals = draw(arrival_lists())
    first = arrivals[0].at_s if arrivals else draw(MOMENTS)
    sent_s = first - draw(MOMENTS)
    chat = Chat(draw(st.integers(0, 99)), scheduled_s=sent_s - draw(MOMENTS), sent_s=sent_s, arrivals=arrivals)
    counted = sum(arrival.tokens for arrival in arrivals)
    chat.last_offset = draw(st.sampled_from([counted, None]))
    chat.usage_tokens = draw(st.sampled_from([counted, None]))
    chat.prompt_tokens = draw(st.none() | st.integers(0, 50))
    fate = draw(st.sampled_from(["completed", "failed", "interrupted"]))
    if fate != "interrupted":
        chat.ended_s = (arrivals[-1].at_s if arrivals else sent_s) + draw(MOMENTS)
    if fate == "failed":
        chat.failure = Failure(draw(st.sampled_from(["timeout", "queue_full"])), "said so")
    return chat


RUNS = st.lists(chats(), max_size=12)


def whole_run(run: Sequence[Chat]) -> tuple[float, float]:
    """Start and end of a run that holds every moment of its chats."""
    return -3000.0, max([chat.ended_s or 0.0 for chat in run] + [a.at_s for chat in run for a in chat.arrivals], default=0.0) + 1


def story(arrivals: list[tuple[float, int]], sent_s: float = 0.0, ended_s: float | None = None) -> Chat:
    """A completed chat."""
    chat = Chat(0, sent_s, sent_s, [Arrival(at_s, tokens) for at_s, tokens in arrivals], finish="stop")
    chat.ended_s = arrivals[-1][0] if ended_s is None else ended_s
    return chat


@UNTIMED
@given(VALUES.filter(lambda values: len(values) > 1), st.integers(1, 99))
def test_percentile_is_the_inclusive_quantile_of_the_standard_library(ordered: list[float], percent: int) -> None:
    assert percentile(ordered, percent) == pytest.approx(statistics.quantiles(ordered, n=100, method="inclusive")[percent - 1])


@UNTIMED
@given(VALUES, st.floats(0, 100), st.floats(0, 100))
def test_percentile_never_falls_as_the_percent_rises_and_stays_within_the_values(ordered: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert ordered[0] <= percentile(ordered, low) <= percentile(ordered, high) * (1 + 1e-12) <= ordered[-1] * (1 + 1e-12)


@UNTIMED
@given(VALUES)
def test_percentiles_0_50_and_100_are_minimum_median_and_maximum(ordered: list[float]) -> None:
    assert percentile(ordered, 0) == ordered[0]
    assert percentile(ordered, 50) == pytest.approx(statistics.median(ordered))
    assert percentile(ordered, 100) == ordered[-1]


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 50)


@UNTIMED
@given(VALUES)
def test_distribution_agrees_with_the_standard_library(values: list[float]) -> None:
    spread = distribution([None, *values, None])
    assert spread is not None
    assert spread.count == len(values)
    assert spread.mean == pytest.approx(statistics.fmean(values))
    assert spread.std == pytest.approx(statistics.pstdev(values), abs=1e-6)
    assert spread.lowest <= spread.mean <= spread.highest


def test_distribution_of_nothing_is_none() -> None:
    assert distribution([None, None]) is None


@UNTIMED
@given(arrival_lists(min_size=1))
def test_token_gaps_are_one_fewer_than_the_tokens_and_add_up_to_first_to_last(arrivals: list[Arrival]) -> None:
    gaps = token_gaps_s(arrivals)
    assert len(gaps) == sum(arrival.tokens for arrival in arrivals) - 1
    assert min(gaps, default=0.0) >= 0
    assert sum(gaps) == arrivals[-1].at_s - arrivals[0].at_s


@UNTIMED
@given(arrival_lists(min_size=1))
def test_frames_keep_every_token_and_each_has_a_moment_of_its_own(arrivals: list[Arrival]) -> None:
    joined = frames(arrivals)
    assert sum(frame.tokens for frame in joined) == sum(arrival.tokens for arrival in arrivals)
    assert [frame.at_s for frame in joined] == sorted({arrival.at_s for arrival in arrivals})
    assert all(gap > 0 for gap in frame_gaps_s(arrivals))


@UNTIMED
@given(arrival_lists(min_size=1), MOMENTS)
def test_tpot_times_the_later_tokens_is_first_to_last(arrivals: list[Arrival], ttft: float) -> None:
    chat = Chat(0, 0.0, arrivals[0].at_s - ttft, arrivals)
    assert ttft_s(chat) == ttft
    tpot = tpot_s(chat)
    if chat.tokens < 2:
        assert tpot is None
    else:
        assert tpot is not None
        assert tpot * (chat.tokens - 1) == pytest.approx(arrivals[-1].at_s - arrivals[0].at_s)


def test_chat_speed_is_one_over_tpot_and_none_when_all_tokens_came_at_once() -> None:
    assert tokens_per_s(story([(1.0, 1), (1.5, 1), (2.0, 1)])) == 2.0
    assert tokens_per_s(story([(1.0, 3)])) is None
    assert tokens_per_s(story([(1.0, 1)])) is None


@UNTIMED
@given(chats())
def test_latency_from_the_plan_is_that_from_the_send_plus_the_delay_of_the_send(chat: Chat) -> None:
    late = chat.sent_s - chat.scheduled_s
    if chat.arrivals:
        assert scheduled_ttft_s(chat) == (ttft_s(chat) or 0) + late
    if chat.ended_s is not None:
        assert scheduled_e2e_s(chat) == chat.ended_s - chat.sent_s + late


def test_tokens_are_counted_by_offset_then_usage_then_events() -> None:
    chat = story([(1.0, 1), (2.0, 1)])
    assert (chat.tokens, chat.token_source) == (2, "events")
    chat.usage_tokens = 7
    assert (chat.tokens, chat.token_source) == (7, "usage")
    chat.last_offset = 8
    assert (chat.tokens, chat.token_source) == (8, "offsets")


@UNTIMED
@given(SPANS)
def test_peak_overlap_is_the_most_spans_that_cover_one_instant(spans: list[tuple[float, float]]) -> None:
    instants = [tick + 0.5 for tick in range(45)]
    assert peak_overlap(spans) == max(sum(start < instant < end for start, end in spans) for instant in instants)


@UNTIMED
@given(SPANS)
def test_steady_window_runs_from_the_first_to_the_last_instant_near_the_peak(spans: list[tuple[float, float]]) -> None:
    instants = [tick + 0.5 for tick in range(45)]
    full = [i for i in instants if (level := sum(s < i < e for s, e in spans)) and level >= STEADY_SHARE * peak_overlap(spans)]
    assert steady_window(spans) == ((full[0] - 0.5, full[-1] + 0.5) if full else None)


@UNTIMED
@given(st.integers(1, 8), st.integers(2, 40))
def test_steady_throughput_of_streams_of_constant_speed_is_their_joint_speed(streams: int, tokens: int) -> None:
    run = [story([(1 + i / 4, 1) for i in range(tokens)]) for _ in range(streams)]
    assert steady_throughput(run) == ((tokens - 1) / 4, 4.0 * streams)


def test_steady_throughput_leaves_ramp_up_and_ramp_down_out() -> None:
    lonely_start = story([(0.0, 1), (10.0, 1)], ended_s=10.0)
    both = [story([(10.0, 1), (11.0, 5), (12.0, 5)]), story([(10.0, 1), (11.0, 5), (12.0, 5)])]
    lonely_end = story([(12.0, 1), (90.0, 1)])
    # 12.0 is the end of the window: the last token of each of the two, and the first of the straggler.
    assert steady_throughput([lonely_start, *both, lonely_end]) == (2.0, (10 + 10 + 1) / 2)


@UNTIMED
@given(RUNS)
def test_every_chat_is_completed_failed_or_interrupted(run: list[Chat]) -> None:
    found = figures(run, *whole_run(run))
    assert found["completed"] + found["failed"] + found["interrupted"] == len(run)  # type: ignore[operator]


@UNTIMED
@given(RUNS)
def test_throughputs_times_the_duration_are_the_totals(run: list[Chat]) -> None:
    start, end = whole_run(run)
    found = figures(run, start, end)
    completed = [chat for chat in run if chat.completed]
    for rate, total in (
        ("request_throughput", len(completed)),
        ("output_throughput", sum(chat.tokens for chat in completed)),
        ("total_token_throughput", sum(chat.tokens + (chat.prompt_tokens or 0) for chat in completed)),
    ):
        assert (found[rate] or 0) * (end - start) == pytest.approx(total)


@UNTIMED
@given(RUNS)
def test_failed_and_interrupted_chats_add_nothing_to_totals_or_latencies(run: list[Chat]) -> None:
    start, end = whole_run(run)
    whole, completed = figures(run, start, end), figures([chat for chat in run if chat.completed], start, end)
    counted_over_all = {"failed", "interrupted", "max_concurrent_requests", "steady_window_s", "steady_output_throughput"}
    assert {name: value for name, value in whole.items() if name not in counted_over_all} == {
        name: value for name, value in completed.items() if name not in counted_over_all
    }


@UNTIMED
@given(RUNS)
def test_percentiles_of_every_latency_are_in_order(run: list[Chat]) -> None:
    found = figures(run, *whole_run(run))
    for name in latencies_s(run):
        ordered = [found[f"{statistic}_{name}_ms"] for statistic in ("median", "p90", "p95", "p99")]
        known = [value for value in ordered if value is not None]
        assert len(known) in (0, 4)
        assert known == sorted(known)


@UNTIMED
@given(RUNS)
def test_figures_are_json_without_nan(run: list[Chat]) -> None:
    json.dumps(figures(run, *whole_run(run)), allow_nan=False)


def test_run_of_no_length_has_no_throughput() -> None:
    assert figures([], 1.0, 1.0)["output_throughput"] is None


def test_figures_of_a_run_worked_out_by_hand() -> None:
    fast = story([(1.0, 1), (1.25, 3), (2.0, 1)], sent_s=0.5, ended_s=2.5)
    slow = story([(3.0, 1), (7.0, 1)], sent_s=1.0, ended_s=8.0)
    fast.scheduled_s, fast.prompt_tokens, slow.prompt_tokens = 0.25, 10, 20
    lost = Chat(2, 0.0, 0.0, [Arrival(1.0, 1)], ended_s=1.5, failure=Failure("connection_lost", "gone"))
    found = figures([fast, slow, lost], 0.0, 10.0)
    expected = {
        "completed": 2,
        "failed": 1,
        "duration": 10.0,
        "total_input_tokens": 30,
        "total_output_tokens": 7,
        "request_throughput": 0.2,
        "output_throughput": 0.7,
        "max_concurrent_requests": 3,
        "mean_ttft_ms": 1250.0,
        "median_ttft_ms": 1250.0,
        "std_ttft_ms": 750.0,
        "p90_ttft_ms": 1850.0,
        "mean_scheduled_ttft_ms": 1375.0,
        "mean_tpot_ms": (250 + 4000) / 2,
        "mean_itl_ms": (250 + 0 + 0 + 750 + 4000) / 5,
        "mean_frame_gap_ms": (250 + 750 + 4000) / 3,
        "mean_e2el_ms": (2000 + 7000) / 2,
        "frames": 5,
        "frames_with_several_tokens": 1,
        "tokens_in_shared_frames": 3,
        "max_tokens_in_a_frame": 3,
        "mean_chat_tokens_per_s": (4 + 0.25) / 2,
        "mean_server_queue_ms": None,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_server_times_split_the_first_token_by_durations_alone() -> None:
    chat = story([(5.0, 1), (6.0, 1)], sent_s=4.0)
    chat.server_queue_s, chat.server_first_token_s = 0.25, 0.875
    found = figures([chat], 0.0, 10.0)
    parts = [found[f"mean_{name}_ms"] for name in ("server_queue", "server_prefill", "network_ttft")]
    assert parts == [250.0, 625.0, 125.0]
    assert math.fsum(part or 0 for part in parts) == found["mean_ttft_ms"]
