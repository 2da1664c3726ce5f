"""Liveness, readiness and numbers."""

from __future__ import annotations

import re

import aiohttp
import pytest

from support.http import state_of
from support.live_server import LiveServer
from support.scripted_worker import ScriptedWorker

CHAT = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]}


async def numbers(http: aiohttp.ClientSession) -> dict[str, float]:
    async with http.get("/metrics") as answer:
        assert answer.status == 200
        return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", await answer.text(), re.M)}


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/readyz?workers=0"])
async def test_status_needs_no_key(server: LiveServer, path: str) -> None:
    async with aiohttp.ClientSession(server.url) as http, http.get(path) as answer:
        assert answer.status == 200


async def test_readiness_can_wait_for_workers(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with http.get("/readyz?workers=1") as answer:
        assert answer.status == 503
        assert "0 workers are logged in and 1 were asked for" in (await answer.json())["error"]["message"]
    async with ScriptedWorker(server.url, server.worker_key):
        async with http.get("/readyz?workers=1") as answer:
            assert (answer.status, (await answer.json())["workers"]) == (200, 1)
        async with http.get("/readyz?workers=2") as answer:
            assert answer.status == 503
    async with http.get("/readyz?workers=x") as answer:
        assert answer.status == 400


async def test_metrics_follow_a_job_through_the_house(server: LiveServer, http: aiohttp.ClientSession) -> None:
    before = await numbers(http)
    async with http.post("/v1/jobs", json=CHAT) as answer:
        job_id = (await answer.json())["id"]
    assert (await numbers(http))['mixtral_queue_waiting{endpoint="mixtral_chat"}'] == 1
    async with ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker:
        await state_of(http, job_id, "streaming")
        running = await numbers(http)
        worker.go.set()
        await state_of(http, job_id, "done")
    after = await numbers(http)
    assert running['mixtral_queue_running{endpoint="mixtral_chat"}'] == 1
    assert running['mixtral_queue_workers{endpoint="mixtral_chat"}'] == 1
    assert after['mixtral_jobs_ended_total{endpoint="mixtral_chat",state="done"}'] == 1
    assert after['mixtral_tokens_total{endpoint="mixtral_chat"}'] == 10
    put = 'mixtral_jobs_put_total{endpoint="mixtral_chat"}'
    assert after[put] == before.get(put, 0) + 1
    route = 'mixtral_http_requests_total{method="POST",route="/v1/jobs",status="202"}'
    assert after[route] == before.get(route, 0) + 1


async def test_metrics_tell_no_secret_and_their_labels_are_bounded(server: LiveServer, http: aiohttp.ClientSession) -> None:
    for path in ("/v1/models/secret-words", "/v1/jobs/secret-words", "/secret-words", "/page/secret-words.js"):
        async with http.get(path):
            pass
    async with http.request("SECRET", "/livez"):
        pass
    async with http.get("/metrics") as answer:
        text = (await answer.text()).lower()
    assert "secret" not in text
    assert server.client_key.lower() not in text
    assert 'route="/v1/jobs/{id}"' in text
