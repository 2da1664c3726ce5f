"""The judge of all fault tests is itself judged: it passes the promised history and names every other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

from mixtral_client.protocol import (
    DoneEvent,
    ErrorDetail,
    ErrorEvent,
    JobEvent,
    JobView,
    MovedEvent,
    QueuedEvent,
    RewindEvent,
    TokenEvent,
    Usage,
    event_id,
    ids_crc,
)
from support.history import Broken, Chat, check
from support.toy_model import ToyTokenizer, answer_to

Events: TypeAlias = list[tuple[str, JobEvent]]

TOKENS = 9
ANSWER = answer_to("hello", 7, TOKENS)
DONE = ("", DoneEvent(finish="length", usage=Usage(prompt_tokens=3, completion_tokens=TOKENS, total_tokens=TOKENS + 3)))
VIEW = JobView(id="job", model="brisk", state="done", created=0, tokens=TOKENS, text=ANSWER.text, finish="length")


def id_at(offset: int) -> str:
    return event_id(offset, ids_crc(ANSWER.ids[:offset]))


def token(offset: int) -> tuple[str, JobEvent]:
    """As a worker sends it: the text of half a letter comes with the other half."""
    whole = [ToyTokenizer().decode(ANSWER.ids[:upto]).removesuffix("\ufffd") for upto in (offset - 1, offset)]
    return id_at(offset), TokenEvent(offset=offset, text=whole[1].removeprefix(whole[0]))


def promised() -> Events:
    return [("", QueuedEvent(position=1)), *map(token, range(1, TOKENS + 1)), DONE]


def judge(events: Events, view: JobView = VIEW) -> None:
    check(Chat("hello", 7, TOKENS, "brisk", job_id="job", events=events), view)


def test_promised_history_passes_with_moves_and_rewinds_that_were_told() -> None:
    judge(promised())
    events = promised()
    judge([*events[:5], ("", MovedEvent(attempt=2)), (id_at(2), RewindEvent(to=2)), *events[3:]])


@pytest.mark.parametrize(
    ("breaking", "sentence"),
    [
        (lambda all: all[:4] + all[5:], "brought token 5 after token 3"),
        (lambda all: [*all[:4], all[3], *all[4:]], "brought token 3 after token 3"),
        (lambda all: [*all[:3], all[4], all[3], *all[5:]], "brought token 4 after token 2"),
        (lambda all: all[:-1], "had 0 terminal events"),
        (lambda all: [*all, DONE], "had 2 terminal events"),
        (lambda all: [*all[:-2], DONE, all[-2]], "had 1 terminal events, one at the very end"),
        (lambda all: [*all[:-2], DONE], "ended by length with 8 tokens of 9"),
        (lambda all: [*all[:3], (id_at(4), all[3][1]), *all[4:]], "other ids than the model's at or before token 3"),
        (lambda all: [*all[:2], (all[2][0], TokenEvent(offset=2, text="forked ")), *all[3:]], "forked"),
        (lambda all: [*all[:3], (id_at(5), RewindEvent(to=5)), *all[3:]], "rewound to 5 at token 2"),
        (lambda all: [*all[:3], ("", MovedEvent(attempt=2)), ("", MovedEvent(attempt=2)), *all[3:]], "moved to attempt 2 after 2"),
        (lambda all: [*all[:-1], ("", ErrorEvent(error=ErrorDetail(message="m", type="t", code="oops")))], "oops"),
    ],
    ids=[
        "gap",
        "repeat",
        "order",
        "no end",
        "two ends",
        "end before the end",
        "short",
        "other ids",
        "other text",
        "rewind",
        "move",
        "error",
    ],
)
def test_history_that_breaks_a_promise_is_named(breaking: Callable[[Events], Events], sentence: str) -> None:
    with pytest.raises(Broken, match=sentence):
        judge(breaking(promised()))


def test_cancelled_history_is_a_beginning_and_only_for_who_asked() -> None:
    done = ("", DoneEvent(finish="cancelled", usage=Usage(completion_tokens=4)))
    view = VIEW.model_copy(
        update={"state": "cancelled", "finish": "cancelled", "tokens": 4, "text": "".join(t[1].text for t in promised()[1:5])}
    )
    cut = Chat("hello", 7, TOKENS, "brisk", job_id="job", events=[*promised()[:5], done])
    with pytest.raises(Broken, match="ended by cancelled"):
        check(cut, view)
    cut.is_cancelled = True
    check(cut, view)
    with pytest.raises(Broken):
        check(cut, view.model_copy(update={"text": "other"}))


@pytest.mark.parametrize(
    "changes", [{"text": "other"}, {"state": "failed"}, {"tokens": TOKENS - 1}], ids=lambda changes: next(iter(changes))
)
def test_log_that_differs_from_what_the_reader_has_is_named(changes: dict[str, object]) -> None:
    with pytest.raises(Broken):
        judge(promised(), VIEW.model_copy(update=changes))
