"""The waits between tries, and what of a stream is new: pure, so by clock and dice in hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_client.errors import BadAnswer, ConnectionLost, LimitReached, MixtralError, NotAuthenticated
from mixtral_client.protocol import RewindEvent, TokenEvent
from mixtral_client.resume import LogPosition, Patience, Retry
from mixtral_client.sse import ServerSentEvent

LOST = ConnectionLost("gone")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def patience(clock: Clock, *, give_up_after_s: float = 1000.0, dice: float = 1.0) -> Patience:
    return Patience(Retry(first_wait_s=0.5, max_wait_s=10), give_up_after_s, clock=clock, dice=lambda: dice)


def full(retry_after_s: float) -> LimitReached:
    error = LimitReached("full", code="queue_full", status=429)
    error.retry_after_s = retry_after_s
    return error


def test_waits_double_up_to_the_longest() -> None:
    waits = patience(Clock())
    assert [waits.wait_s(LOST) for _ in range(7)] == [0.5, 1, 2, 4, 8, 10, 10]


@given(st.floats(0, 1))
def test_wait_is_between_half_and_whole_so_that_readers_spread(dice: float) -> None:
    assert 0.25 <= patience(Clock(), dice=dice).wait_s(LOST) <= 0.5


def test_wait_is_at_least_what_the_server_asked_for() -> None:
    waits = patience(Clock())
    assert [waits.wait_s(full(7)), waits.wait_s(full(0))] == [7, 1]


def test_success_starts_the_waits_and_the_time_anew() -> None:
    clock = Clock()
    waits = patience(clock, give_up_after_s=5)
    assert [waits.wait_s(LOST), waits.wait_s(LOST)] == [0.5, 1]
    clock.now += 1000
    waits.reset()
    assert waits.wait_s(LOST) == 0.5


def test_error_is_raised_once_the_next_try_would_come_too_late() -> None:
    clock = Clock()
    waits = patience(clock, give_up_after_s=5)
    waits.wait_s(LOST)
    clock.now += 3.9
    assert waits.wait_s(LOST) == 1
    clock.now += 0.2
    with pytest.raises(ConnectionLost, match="gone"):
        waits.wait_s(LOST)


def test_tries_in_a_row_are_counted_and_progress_begins_anew() -> None:
    waits = Patience(Retry(first_wait_s=0.5, max_tries=3), 1000.0, clock=Clock(), dice=lambda: 1.0)
    for _ in range(2):
        assert [waits.wait_s(LOST), waits.wait_s(LOST)] == [0.5, 1]
        with pytest.raises(ConnectionLost):
            waits.wait_s(LOST)
        waits.reset()
    with pytest.raises(ValueError, match="must be 1 or more; got 0"):
        Retry(max_tries=0)


@pytest.mark.parametrize("error", [NotAuthenticated("no", code="invalid_api_key"), BadAnswer("what")])
def test_error_that_will_not_pass_is_raised_at_once(error: MixtralError) -> None:
    with pytest.raises(type(error)):
        patience(Clock()).wait_s(error)


moves = st.lists(st.tuples(st.sampled_from(["token", "rewind"]), st.integers(0, 6)), max_size=30)


@given(moves)
def test_reader_is_never_told_a_repeat_nor_a_gap(moves: list[tuple[str, int]]) -> None:
    """Whatever order offsets come in, each token told is the one after the last, and a rewind always goes back."""
    position = LogPosition("job")
    at = 0
    for kind, number in moves:
        field = "offset" if kind == "token" else "to"
        raw = ServerSentEvent(kind, f'{{"{field}": {number}, "text": ""}}', f"{number}.0000000a")
        try:
            event = position.take(raw)
        except ConnectionLost:
            assert kind == "token"
            assert number > at + 1
            continue
        if isinstance(event, TokenEvent):
            assert event.offset == at + 1
            at = event.offset
        elif isinstance(event, RewindEvent):
            assert event.to < at
            at = event.to
        else:
            assert number <= at if kind == "token" else number >= at
        assert position.offset == at
        assert position.id in ({f"{at}.0000000a"} if at else {"", "0.0000000a"})
