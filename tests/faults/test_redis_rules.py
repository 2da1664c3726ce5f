"""The user with the fewest rights that docs/operations.md shows, over TLS with a client's certificate: it serves all, and no less would."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from support.history import OpenAIStream, Readers, read_openai
from support.house import BRISK, ROOT, STEADY, House
from support.http import until
from support.redis_kinds import PASSWORD, TlsRedis

pytestmark = pytest.mark.timeout(240)

PAGE = (ROOT / "docs" / "operations.md").read_text()
[LINE] = re.findall(r"^ACL SETUSER mixtral on >PASSWORD (.*)$", PAGE, re.M)
FROM_PYTHON = {"cluster|slots", "evalsha", "get", "info", "ping", "script|load", "select", "set", "subscribe"}


def test_documented_rights_are_those_of_the_scripts_and_no_more() -> None:
    scripts = (ROOT / "server" / "mixtral_server" / "lua").glob("*.lua")
    used = {word.lower() for script in scripts for word in re.findall(r"\bcall\('([A-Z]+)'", script.read_text())} | FROM_PYTHON
    assert set(re.findall(r"\+(\S+)", LINE)) == used, "docs/operations.md must name what the server uses: correct its ACL line"


async def test_whole_service_works_with_exactly_the_documented_rights(tmp_path: Path) -> None:
    tls = TlsRedis("mixtral", LINE)
    with House(tmp_path, on=tls, redis_url=tls.tls_url.replace("/0?", "/1?")) as house:
        async with Readers(house.urls, house.key("client")) as readers:
            poisoned = readers.start("poison", model=BRISK)
            for _ in range(3):  # each dies with it; the third gives it up
                died = await house.hire(endpoint=BRISK, poison="poison")
                await until(lambda died=died: not died.is_running)  # type: ignore[misc]
            await poisoned.end()
            worker = await house.hire(endpoint=STEADY)
            chats = [readers.start(f"chat {number}", seed=number, model=STEADY) for number in range(3)]
            cancelled = readers.start("cancelled", tokens=500, model=STEADY)
            await cancelled.reach(3)
            await readers.client.cancel(cancelled.job_id)
            stream = OpenAIStream()
            async with readers.http.post(f"{house.b.url}/v1/chat/completions", json=chats[0].body | {"stream": True}) as answer:
                await read_openai(answer, stream)
            assert stream.is_done
            await readers.ended(*chats)
            await cancelled.end()
            assert "mixtral_redis_up 1.0" in house.a.metrics()
            await asyncio.to_thread(worker.kill)
            with tls.client() as client:
                client.select(1)
                assert client.acl_log() == [], "a right is missing from the ACL line of docs/operations.md"
                client.execute_command("ACL", "SETUSER", "mixtral", "-hset")
            async with readers.http.post(f"{house.a.url}/v1/jobs", json=chats[0].body) as answer:
                assert answer.status >= 500, "the rights are what is asked for"
            said = "".join(replica.said() for replica in house.replicas)
            assert PASSWORD not in said
            assert "word%231" not in said
