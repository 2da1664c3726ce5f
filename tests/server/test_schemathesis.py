"""Every operation of openapi.json under schemathesis, against a real server with a worker: right requests and wrong ones.

No 500, no status, media type or body that the document does not have. The examples are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mixtral_client.protocol import PROTOCOL_VERSION
from mixtral_server.app import ROUTES
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.routes.openapi import document
from support.live_server import LiveServer
from support.redis import RedisProcess, redis_binary
from support.worker_thread import WorkerThread

EXAMPLES = 40  # of each operation, right and wrong ones
ENDPOINT = EndpointConfig(name="mixtral_chat", default_max_tokens=8, sessions_per_key=100_000)
DOCUMENT = document(ROUTES, [ENDPOINT])
OPERATIONS = [result.ok() for result in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()]


def no_server_error(context: Any, response: Any, case: Any) -> None:
    """But for the 503 of a probe that asks for more workers than there are."""
    assert response.status_code < 500 or (case.path, response.status_code) == ("/readyz", 503), response.text


CHECKS = [
    no_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def may_be_wrong(operation: Any) -> bool:
    """Any text is right where only a path's free parts can be chosen."""
    described = DOCUMENT["paths"][operation.path][operation.method]
    return "requestBody" in described or any(one["in"] != "path" or "enum" in one["schema"] for one in described["parameters"])


ATTACKS = [(operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
ATTACKS += [(operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if may_be_wrong(operation)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with (
        RedisProcess(redis_binary("6.2"), "--appendonly", "no") as redis,
        LiveServer(tmp_path_factory.mktemp("server"), redis.url, ENDPOINT, worker_poll_s=0.1, body_timeout_s=2.0) as server,
        WorkerThread(server, slots=64, per_turn=100),
    ):
        yield server


@pytest.fixture(scope="module")
def known(server: LiveServer) -> dict[str, Any]:
    """Values that name something, by the name of the parameter or field."""
    job = requests.post(
        f"{server.url}/v1/jobs", json={"model": ENDPOINT.name, "prompt": "x"}, headers=bearer(server.client_key), timeout=20
    )
    worker = {"endpoint": ENDPOINT.name, "name": "x", "protocol": PROTOCOL_VERSION, "version": "0", "model": "x", "device": "x"}
    login = requests.post(
        f"{server.url}/v1/worker/sessions",
        json=worker | {"max_slots": 1, "max_seq_len": 1},
        headers=bearer(server.worker_key),
        timeout=20,
    )
    names = {"id": job.json()["id"], "session": login.json()["session"], "model": ENDPOINT.name, "endpoint": ENDPOINT.name}
    return names | {"file": "chat.js", "key": server.client_key, "protocol": PROTOCOL_VERSION}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("operation", "mode"), ATTACKS, ids=[f"{mode.value} {operation.label}" for operation, mode in ATTACKS])
def test_operation_answers_as_documented(server: LiveServer, known: dict[str, Any], operation: Any, mode: GenerationMode) -> None:
    of_worker = operation.path.startswith("/v1/worker")
    right, other = (server.worker_key, server.client_key) if of_worker else (server.client_key, server.worker_key)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=operation.as_strategy(generation_mode=mode),
        is_known=st.booleans(),
        key=st.sampled_from([right] * 6 + [other, "mx-c-unknown", None]),
    )
    def attack(case: Any, is_known: bool, key: str | None) -> None:
        for fields in (case.path_parameters, case.query, case.body) if is_known else ():
            if isinstance(fields, dict):
                fields.update({name: value for name, value in known.items() if name in fields})
        case.call_and_validate(base_url=server.url, headers=bearer(key) if key else {}, checks=CHECKS, timeout=20)

    attack()
