"""docs/api.md names every route, field, event, error, header and metric, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from mixtral_client.protocol import (
    CALLER_ERRORS,
    ChatRequest,
    CompletionRequest,
    DoneEvent,
    ErrorEvent,
    JobEvent,
    JobRequest,
    ModelCard,
    MovedEvent,
    QueuedEvent,
    RequestMessage,
    RewindEvent,
    SamplingFields,
    StreamOptions,
    TokenEvent,
)
from mixtral_server import errors
from mixtral_server.app import ROUTES
from mixtral_server.metrics import Metrics
from mixtral_server.routes.openapi import HEADERS
from mixtral_server.routes.service import Route

API = (Path(__file__).resolve().parents[3] / "docs" / "api.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Cells of the tables under a heading, without code marks."""
    section = re.split(rf"^#+ {heading}$", API, flags=re.M)[1].split("\n#")[0]
    tables = re.findall(r"(?:^\|.*\n?)+", section, re.M)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def test_every_route_is_listed_with_its_scope() -> None:
    listed = {row[0]: row[1] for row in rows("Routes")}
    assert listed == {f"{route.method} {route.path}": route.scope if isinstance(route, Route) else "–" for route in ROUTES}


def test_every_event_is_listed_with_its_fields() -> None:
    listed = {row[0]: row[1].split(", ") for row in rows("Events")}
    kinds = (QueuedEvent, TokenEvent, MovedEvent, RewindEvent, DoneEvent, ErrorEvent)
    assert set(kinds) == set(get_args(JobEvent))
    assert listed == {kind.model_fields["event"].default: [name for name in kind.model_fields if name != "event"] for kind in kinds}


def classes(kind: type[errors.ServiceError]) -> list[type[errors.ServiceError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in classes(child))]


def test_every_error_is_listed_with_its_status_and_when_it_comes() -> None:
    listed = {(int(row[0]), row[1], row[2]) for row in rows("Errors") if row[0].isdecimal()}
    known = (one for one in classes(errors.ServiceError) if one is not errors.JobFailed)
    assert listed == {(one.status, one.code, one.when.replace("`", "")) for one in known}


def test_every_code_word_of_a_worker_that_is_the_callers_to_mend_is_listed() -> None:
    listed = [name for row in rows("Errors") for name in row[0].split(", ") if not name.isdecimal()]
    assert sorted(listed) == sorted(CALLER_ERRORS)


def test_every_sampling_field_is_listed() -> None:
    listed = {name.split()[-1] for row in rows("Sampling") for name in row[0].split(", ")}
    assert listed == set(SamplingFields.model_fields) | {"logprobs", "top_logprobs", "truncate"}


def test_every_field_of_a_request_and_of_a_model_card_is_named() -> None:
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", API))))
    for model in (ChatRequest, CompletionRequest, RequestMessage, StreamOptions, JobRequest, ModelCard):
        assert model.model_fields.keys() - named - {"object", "owned_by", "created"} == set()


def test_every_header_of_an_answer_is_named() -> None:
    for name in HEADERS:
        unit = name.rpartition("-")[2]
        assert name in API or (name.startswith("X-RateLimit") and f"-{unit}`" in API), name


def test_tree_at_the_top_of_errors_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"(\w+) +(\d{3}) (\w+)$", errors.__doc__, re.M)
    known = {(one.__name__, str(one.status), one.code) for one in classes(errors.ServiceError) if one is not errors.JobFailed}
    assert set(drawn) == known
    assert "JobFailed" in errors.__doc__


def test_every_metric_is_listed() -> None:
    metrics = Metrics()
    shown = metrics.render({}, processes={0: metrics.numbers()}).decode()
    kinds = dict(re.findall(r"^# TYPE (mixtral_\w+) (\w+)$", shown, re.M))
    names = {name for name in kinds if not name.endswith("_created")}
    assert {row[0] for row in rows("Metrics")} == names
