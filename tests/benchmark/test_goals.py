"""Goodput: a chat is good if it completed and kept every goal, and a failed one never is."""

from __future__ import annotations

import pytest

from mixtral_benchmark.goals import goodput, is_good, parse_goals
from mixtral_benchmark.measure import Arrival, Chat, Failure


def chat(scheduled_s: float = 0.0, sent_s: float = 0.0) -> Chat:
    """First token at 1 s, then 0.1, 0.1 and 0.4 s; ended at 2 s."""
    arrivals = [Arrival(at_s, 1) for at_s in (1.0, 1.1, 1.2, 1.6)]
    return Chat(0, scheduled_s, sent_s, arrivals, ended_s=2.0, usage_tokens=4)


@pytest.mark.parametrize(
    ("goal", "kept", "missed"),
    [("ttft_ms", 1000, 999), ("tpot_ms", 200.1, 199.9), ("e2el_ms", 2000, 1999), ("gap_ms", 400.1, 399.9)],
)
def test_each_goal_is_kept_up_to_its_limit(goal: str, kept: float, missed: float) -> None:
    assert is_good(chat(), {goal: kept})
    assert not is_good(chat(), {goal: missed})


def test_chat_must_keep_every_goal() -> None:
    assert is_good(chat(), {"ttft_ms": 1000, "e2el_ms": 2000})
    assert not is_good(chat(), {"ttft_ms": 1000, "e2el_ms": 1999})


def test_waiting_counts_from_the_planned_send_so_that_a_late_sender_makes_nobody_look_good() -> None:
    assert is_good(chat(scheduled_s=0.5, sent_s=0.5), {"ttft_ms": 500})
    assert not is_good(chat(scheduled_s=0.0, sent_s=0.5), {"ttft_ms": 500})


def test_failed_refused_and_interrupted_chats_are_never_good_and_failures_count_against_the_share() -> None:
    failed = Chat(1, 0.0, 0.0, [Arrival(0.1, 1)], ended_s=0.2, failure=Failure("queue_full", "429"))
    found = goodput([chat(), failed, Chat(2, 0.0, 0.0)], duration_s=2.0, goals={"ttft_ms": 5000})
    assert found == {"request_goodput": 0.5, "good_share": 0.5}


def test_single_token_has_no_gap_to_miss() -> None:
    assert is_good(Chat(0, 0.0, 0.0, [Arrival(1.0, 1)], ended_s=1.0, usage_tokens=1), {"tpot_ms": 1, "gap_ms": 1})


def test_without_goals_there_is_no_goodput() -> None:
    assert goodput([chat()], 1.0, {}) == {"request_goodput": None, "good_share": None}


@pytest.mark.parametrize("text", ["ttft_ms", "ttft:5", "ttft_ms:0", "ttft_ms:-1", "ttft_ms:nan", "ttft_ms:inf", "ttft_ms:x", ":5"])
def test_wrong_goal_is_refused_with_the_names_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="NAME:MILLISECONDS with NAME one of ttft_ms, tpot_ms, e2el_ms, gap_ms"):
        parse_goals(["ttft_ms:500", text])
