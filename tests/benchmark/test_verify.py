"""A wrong stream is noticed, a right one never blamed."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_benchmark.verify import Transcript
from mixtral_client.protocol import JobView

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


LOGS = st.lists(st.text(max_size=3), max_size=12)


def view(texts: list[str], **more: object) -> JobView:
    whole = {"id": "job-0", "model": "m", "state": "done", "created": 0, "tokens": len(texts), "text": "".join(texts)}
    return JobView.model_validate(whole | more)


def heard(texts: list[str]) -> Transcript:
    transcript = Transcript(keep_text=True)
    for offset, text in enumerate(texts, 1):
        assert transcript.token(offset, text) is None
    return transcript


@UNTIMED
@given(LOGS)
def test_stream_that_says_the_log_passes(texts: list[str]) -> None:
    assert heard(texts).compare(view(texts), usage_tokens=len(texts)) is None


@UNTIMED
@given(LOGS, LOGS, st.data())
def test_stream_that_was_rewound_and_went_on_otherwise_passes(lost: list[str], anew: list[str], data: st.DataObject) -> None:
    to = data.draw(st.integers(0, len(lost)))
    transcript = heard(lost)
    assert transcript.rewind(to) is None
    for offset, text in enumerate(anew, to + 1):
        assert transcript.token(offset, text) is None
    said = lost[:to] + anew
    assert transcript.compare(view(said), usage_tokens=len(said)) is None


@UNTIMED
@given(LOGS.filter(bool), st.integers(-3, 20))
def test_only_the_next_offset_is_taken(texts: list[str], offset: int) -> None:
    transcript = heard(texts)
    failure = transcript.token(offset, "x")
    if offset == len(texts) + 1:
        assert failure is None
    else:
        assert failure is not None
        assert failure.code == ("stream_repeat" if offset <= len(texts) else "stream_gap")


@UNTIMED
@given(LOGS, st.integers(-3, 20).filter(lambda to: to != 0))
def test_rewind_beyond_what_was_said_is_a_gap(texts: list[str], to: int) -> None:
    failure = heard(texts).rewind(to)
    assert (failure is not None) == (not 0 <= to <= len(texts))


@pytest.mark.parametrize(
    ("log", "usage_tokens", "code"),
    [
        (view(["one ", "too"]), 2, "verify_text"),
        (view(["one ", "two", ""]), 2, "verify_count"),
        (view(["one ", "two"]), 3, "verify_usage"),
        (view(["one ", "two"], state="failed"), 2, "verify_state"),
    ],
)
def test_difference_from_the_log_has_a_name_of_its_own(log: JobView, usage_tokens: int, code: str) -> None:
    failure = heard(["one ", "two"]).compare(log, usage_tokens)
    assert failure is not None
    assert failure.code == code


def test_text_difference_says_where() -> None:
    failure = heard(["one ", "two"]).compare(view(["one ", "too"]), 2)
    assert failure is not None
    assert failure.message == "stream and log differ from character 6 of 7"
