"""Which error an answer becomes, and how long it asks to wait."""

from __future__ import annotations

import copy
import pickle
import re
from datetime import UTC, datetime

import pytest

from mixtral_client import errors

NOW = datetime(2025, 1, 31, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        (" 0.5 ", 0.5),
        ("Fri, 31 Jan 2025 12:01:30 GMT", 90.0),
        ("Fri, 31 Jan 2025 11:00:00 GMT", 0.0),
        ("soon", None),
        ("-5", None),
        ("inf", None),
        ("9" * 5000, None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_never_negative(header: str | None, seconds: float | None) -> None:
    assert errors.retry_after_s(header, now=NOW) == seconds


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "RequestRefused"),
        (401, "NotAuthenticated"),
        (403, "NotAllowed"),
        (404, "NotFound"),
        (422, "RequestRefused"),
        (429, "LimitReached"),
        (500, "ServerFailed"),
        (503, "Unavailable"),
        (599, "ServerFailed"),
        (302, "Refused"),
        (418, "Refused"),
    ],
)
def test_status_chooses_the_class(status: int, kind: str) -> None:
    error = errors.refusal("GET http://x/", status, {"x-request-id": "r1", "retry-after": "3"}, b"<html>")
    assert type(error).__name__ == kind
    assert (error.status, error.code, error.request_id, error.retry_after_s) == (status, f"http_{status}", "r1", 3.0)


def test_tree_at_the_top_draws_the_classes_as_they_are() -> None:
    drawn: list[tuple[str, str | None]] = []
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line):
            depth, name = len(found[1]), found[2]
            above = [one for one in above if one[0] < depth]
            drawn.append((name, above[-1][1] if above else None))
            above.append((depth, name))
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.MixtralError)]
    actual = [(one.__name__, one.__base__.__name__ if one is not errors.MixtralError and one.__base__ else None) for one in kinds]
    assert sorted(drawn, key=str) == sorted(actual, key=str)


EXAMPLES = [
    errors.refusal("GET http://x/", 429, {"x-request-id": "r1", "retry-after": "3"}, b""),
    errors.JobStopped("job-1", "cancelled", "Once"),
    errors.TimedOut("total", 3.0, "job-1"),
    errors.ConnectionLost("gone", code="answer_timeout"),
    errors.EventTooLarge(100),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_crosses_processes_with_all_it_knows(error: errors.MixtralError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(twin), twin.args, vars(twin), str(twin)) == (type(error), error.args, vars(error), str(error))
