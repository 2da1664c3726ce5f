"""Who may come in: keys and scopes, revoked keys, visitors of the page with their cookie, origin and rate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mixtral_client.protocol import PROTOCOL_VERSION
from mixtral_server.apikeys import ApiKey, hash_of, new_secret, prefix_of
from mixtral_server.auth import COOKIE, KeyRing, network_of
from mixtral_server.errors import Unavailable
from mixtral_server.settings import Settings
from support.http import PATIENCE_S
from support.live_server import LiveServer

CHAT: dict[str, Any] = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]}


# ---------------------------------------------------------------------------------------------- keys over HTTP


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "no API key was given; send `Authorization: Bearer <key>`"),
        ("Bearer", "must be `Bearer <key>`"),
        ("Basic dXNlcjpwYXNz", "must be `Bearer <key>`"),
        ("Bearer mx-c-nothing", "this API key is unknown or revoked"),
        ("Bearer " + "x" * 5000, "this API key is unknown or revoked"),
        ("Bearer käse", "this API key is unknown or revoked"),
    ],
)
async def test_caller_without_a_good_key_is_answered_401_with_what_to_do(server: LiveServer, header: str | None, words: str) -> None:
    headers = {} if header is None else {"Authorization": header}
    async with aiohttp.ClientSession(server.url) as http, http.get("/v1/models", headers=headers) as answer:
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        error = (await answer.json())["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert words in error["message"]
    assert "mx-c-nothing" not in error["message"]


async def test_key_opens_only_the_routes_of_its_scope(server: LiveServer) -> None:
    expected = {"client": (200, 403), "worker": (403, 410), "admin": (403, 403)}
    keys = {"client": server.client_key, "worker": server.worker_key, "admin": server.admin_key}
    async with aiohttp.ClientSession(server.url) as http:
        for scope, statuses in expected.items():
            headers = {"Authorization": f"Bearer {keys[scope]}"}
            models = await http.get("/v1/models", headers=headers)
            turn = await http.post("/v1/worker/turn", json={"session": "x", "turn": 1}, headers=headers)
            assert (models.status, turn.status) == statuses, scope


async def test_refusal_comes_before_the_body_is_looked_at(server: LiveServer) -> None:
    async with aiohttp.ClientSession(server.url) as http, http.post("/v1/jobs", data=b"{broken") as answer:
        assert answer.status == 401


async def test_new_key_is_good_at_once_and_a_revoked_one_refused_within_5_s(server: LiveServer) -> None:
    key = await server.new_key("client")
    async with aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {key}"}) as http:
        async with http.get("/v1/models") as answer:
            assert answer.status == 200
        await server.revoke_key(key)
        revoked_at = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with http.get("/v1/models") as answer:
                    if answer.status == 401:
                        break
                await asyncio.sleep(0.05)
    assert server.settings.key_refresh_s * 2 <= 5
    assert time.monotonic() - revoked_at < PATIENCE_S


async def test_key_for_one_endpoint_is_refused_at_another(server: LiveServer) -> None:
    key = await server.new_key("client", "worker", endpoints=["other"])
    headers = {"Authorization": f"Bearer {key}"}
    login = {
        "endpoint": "mixtral_chat",
        "name": "",
        "protocol": PROTOCOL_VERSION,
        "version": "",
        "model": "",
        "device": "",
        "max_slots": 1,
        "max_seq_len": 1,
    }
    async with aiohttp.ClientSession(server.url, headers=headers) as http:
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/jobs", CHAT), ("/v1/worker/sessions", login)):
            async with http.post(path, json=body) as answer:
                assert answer.status == 403, path
                assert "this key is for other; the request named mixtral_chat" in (await answer.json())["error"]["message"]
        async with http.get("/v1/models") as answer:
            assert (await answer.json())["data"] == []


async def test_turn_that_waits_with_a_revoked_key_gets_no_job(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, key_refresh_s=0.1, worker_claim_s=0.1) as server:
        key = await server.new_key("worker")
        login = {
            "endpoint": "mixtral_chat",
            "name": "",
            "protocol": PROTOCOL_VERSION,
            "version": "",
            "model": "",
            "device": "",
            "max_slots": 1,
            "max_seq_len": 1,
        }
        async with aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {key}"}) as http:
            async with http.post("/v1/worker/sessions", json=login) as answer:
                session = (await answer.json())["session"]
            turn = asyncio.create_task(http.post("/v1/worker/turn", json={"session": session, "turn": 1, "room": 1}).__aenter__())
            await server.revoke_key(key)
            answer = await turn
            assert answer.status == 401
            answer.release()


# ---------------------------------------------------------------------------------------------- the keys in memory


def key_of(secret: str) -> ApiKey:
    return ApiKey("k1", "u1", "alice", "laptop", prefix_of(secret), hash_of(secret), frozenset({"client"}), frozenset(), 1.0, 0.0)


class Table:
    """The keys in SQL as KeyRing reads them; `away` makes reading fail as a database that is down does."""

    def __init__(self) -> None:
        self.keys: list[ApiKey] = []
        self.away = False
        self.reads = 0

    async def read(self) -> Sequence[ApiKey]:
        self.reads += 1
        if self.away:
            raise OSError("connection refused")
        return list(self.keys)


@pytest.fixture
def now() -> list[float]:
    return [1000.0]


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
async def ring(table: Table, now: list[float]) -> KeyRing:
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    ring = KeyRing(table.read, Settings(), clock, (OSError,))
    await ring.refresh()
    return ring


async def test_known_key_is_found_without_asking_the_database(ring: KeyRing, table: Table) -> None:
    secret = new_secret("client")
    table.keys = [key_of(secret)]
    await ring.refresh()
    reads = table.reads
    assert [await ring.find(secret) for _ in range(100)] == [table.keys[0]] * 100
    assert table.reads == reads


async def test_guessed_keys_cost_one_read_for_all_who_wait(ring: KeyRing, table: Table) -> None:
    before = table.reads
    assert await asyncio.gather(*(ring.find(f"guess {n}") for n in range(200))) == [None] * 200
    assert table.reads <= before + 2


async def test_keys_stay_good_for_300_s_while_the_database_is_away_and_no_longer(ring: KeyRing, table: Table, now: list[float]) -> None:
    secret = new_secret("client")
    table.keys = [key_of(secret)]
    await ring.refresh()
    table.away = True
    now[0] += 300
    assert await ring.find(secret) == table.keys[0]
    now[0] += 1
    with pytest.raises(Unavailable, match="the database with the keys has been away for more than 300 s"):
        await ring.find(secret)
    table.away = False
    await ring.refresh()
    assert await ring.find(secret) == table.keys[0]


async def test_unknown_key_is_refused_not_failed_while_the_database_is_away(ring: KeyRing, table: Table) -> None:
    table.away = True
    assert await ring.find("guess") is None


async def test_keep_fresh_outlives_a_database_that_goes_and_comes_back(table: Table) -> None:
    ring = KeyRing(table.read, changed(Settings(), key_refresh_s=0.01), time.monotonic, (OSError,))
    await ring.refresh()
    keeping = asyncio.create_task(ring.keep_fresh())
    try:
        for away in (True, False):
            table.away, reads = away, table.reads
            async with asyncio.timeout(PATIENCE_S):
                while table.reads < reads + 2:  # noqa: ASYNC110 - the ring knows no event for it
                    await asyncio.sleep(0.01)
        assert not keeping.done()
        assert ring.age_s is not None
        assert ring.age_s < PATIENCE_S
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])


# ---------------------------------------------------------------------------------------------- visitors of the page


@pytest.fixture
async def visitor(server: LiveServer) -> AsyncIterator[aiohttp.ClientSession]:
    """A browser that has opened the page, as far as cookies go."""
    async with aiohttp.ClientSession(server.url, cookie_jar=aiohttp.CookieJar(unsafe=True)) as http:  # unsafe: bare addresses too
        async with http.get("/") as answer:
            assert answer.status == 200
        yield http


def own_origin(server: LiveServer) -> dict[str, str]:
    return {"Origin": server.url}


async def test_page_gives_a_cookie_that_no_script_and_no_other_site_gets(server: LiveServer) -> None:
    async with aiohttp.ClientSession(server.url) as http, http.get("/") as answer:
        cookie = answer.cookies[COOKIE]
    assert (cookie["httponly"], cookie["samesite"], cookie["path"], cookie["secure"]) == (True, "Strict", "/", "")


async def test_cookie_is_secure_behind_tls(server: LiveServer) -> None:
    async with aiohttp.ClientSession(server.url) as http, http.get("/", headers={"X-Forwarded-Proto": "https"}) as answer:
        assert answer.cookies[COOKIE]["secure"] is True


async def test_cookie_is_kept_while_it_is_good(server: LiveServer, visitor: aiohttp.ClientSession) -> None:
    async with visitor.get("/") as answer:
        assert COOKIE not in answer.cookies


async def test_visitor_chats_without_a_key_and_sees_only_own_jobs(server: LiveServer, visitor: aiohttp.ClientSession) -> None:
    async with visitor.post("/v1/jobs", json=CHAT, headers=own_origin(server)) as answer:
        assert answer.status == 202
        job_id = (await answer.json())["id"]
    async with visitor.get(f"/v1/jobs/{job_id}") as answer:
        assert answer.status == 200
    async with server.http() as key_holder, key_holder.get(f"/v1/jobs/{job_id}") as answer:
        assert answer.status == 404


@pytest.mark.parametrize(
    "headers",
    [{}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}],
    ids=lambda headers: str(headers) or "none",
)
async def test_visitors_write_from_elsewhere_is_refused(visitor: aiohttp.ClientSession, headers: dict[str, str]) -> None:
    async with visitor.post("/v1/jobs", json=CHAT, headers=headers) as answer:
        assert answer.status == 403
        assert "must be started by this server's own page" in (await answer.json())["error"]["message"]


async def test_visitors_write_with_same_origin_fetch_metadata_alone_is_taken(visitor: aiohttp.ClientSession) -> None:
    async with visitor.post("/v1/jobs", json=CHAT, headers={"Sec-Fetch-Site": "same-origin"}) as answer:
        assert answer.status == 202


async def test_visitor_by_another_name_of_this_machine_is_refused(server: LiveServer, visitor: aiohttp.ClientSession) -> None:
    """DNS rebinding: evil.example resolves to 127.0.0.1, and to the browser all is of one origin."""
    name = f"evil.example:{server.started.port}"
    cookie = next(one for one in visitor.cookie_jar if one.key == COOKIE).value
    headers = {"Host": name, "Origin": f"http://{name}", "Cookie": f"{COOKIE}={cookie}"}
    async with aiohttp.ClientSession(server.url) as http, http.post("/v1/jobs", json=CHAT, headers=headers) as answer:
        assert answer.status == 403
        assert (
            "answers to localhost, 127.0.0.1 and [::1] only; the request named 'evil.example'" in (await answer.json())["error"]["message"]
        )


@pytest.mark.parametrize(
    "tamper",
    [
        lambda text: "v1." + text,
        lambda text: text[:-1] + "0" * (text[-1] != "0") + "1" * (text[-1] == "0"),
        lambda _: "x",
        lambda _: "..",
        lambda _: "",
    ],
)
async def test_forged_cookie_is_refused(server: LiveServer, visitor: aiohttp.ClientSession, tamper: Callable[[str], str]) -> None:
    cookie = next(one for one in visitor.cookie_jar if one.key == COOKIE).value
    headers = {"Cookie": f"{COOKIE}={tamper(cookie)}"}
    async with aiohttp.ClientSession(server.url) as http, http.get("/v1/models", headers=headers) as answer:
        assert answer.status == 401
        assert "reload the page" in (await answer.json())["error"]["message"]


async def test_visitor_opens_no_worker_route(server: LiveServer, visitor: aiohttp.ClientSession) -> None:
    async with visitor.post("/v1/worker/turn", json={"session": "x", "turn": 1}, headers=own_origin(server)) as answer:
        assert answer.status == 403


async def test_visitor_over_the_rate_is_answered_429_and_others_are_not(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, public_page=True, visitor_requests_per_minute=3) as server:
        statuses = []
        for _ in range(2):
            async with aiohttp.ClientSession(server.url, cookie_jar=aiohttp.CookieJar(unsafe=True)) as http:
                async with http.get("/"):
                    pass
                for left in (2, 1, 0, None):
                    answer = await http.post("/v1/jobs", json=CHAT, headers=own_origin(server))
                    statuses.append(answer.status)
                    shown = {name: answer.headers.get(f"X-RateLimit-{name}-Requests") for name in ("Limit", "Remaining")}
                    assert shown == ({"Limit": "3", "Remaining": str(left)} if left is not None else {"Limit": "3", "Remaining": "0"})
                assert 1 <= int(answer.headers["Retry-After"]) <= 20
                assert (await answer.json())["error"]["code"] == "rate_limit_exceeded"
        async with server.http() as http, http.post("/v1/jobs", json=CHAT) as answer:
            statuses.append(answer.status)
    assert statuses == [202, 202, 202, 429] * 2 + [202]


async def test_one_address_cannot_go_over_its_rate_with_many_cookies(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, public_page=True, address_requests_per_minute=3) as server:
        statuses = []
        for _ in range(4):
            async with aiohttp.ClientSession(server.url, cookie_jar=aiohttp.CookieJar(unsafe=True)) as http:
                async with http.get("/"):
                    pass
                async with http.post("/v1/jobs", json=CHAT, headers=own_origin(server)) as answer:
                    statuses.append(answer.status)
    assert statuses == [202, 202, 202, 429]


async def test_page_that_is_not_public_gives_no_cookie_and_takes_none(empty_redis: str, tmp_path: Path, server: LiveServer) -> None:
    with LiveServer(tmp_path, empty_redis) as closed:
        async with aiohttp.ClientSession(closed.url) as http:
            async with http.get("/") as answer:
                assert (answer.status, COOKIE in answer.cookies) == (200, False)
            async with http.get("/v1/models", cookies={COOKIE: "v1.1.x"}) as answer:
                assert answer.status == 401


@pytest.mark.parametrize(
    ("trusted", "forwarded", "counted"),
    [
        ("", "1.2.3.4", "one"),  # nobody is believed
        ("127.0.0.1", "1.2.3.4", "each"),  # the proxy is believed
        ("127.0.0.0/8", "1.2.3.4, 127.0.0.9", "each"),  # a chain of proxies
        ("10.0.0.1", "1.2.3.4", "one"),  # another proxy than this
    ],
)
async def test_forwarded_address_counts_only_from_a_trusted_proxy(
    empty_redis: str, tmp_path: Path, trusted: str, forwarded: str, counted: str
) -> None:
    """Two addresses, a rate of one: both may chat only where the server tells them apart."""
    with LiveServer(tmp_path, empty_redis, public_page=True, address_requests_per_minute=1, trusted_proxies=trusted) as server:
        statuses = []
        for address in (forwarded, forwarded.replace("1.2.3.4", "5.6.7.8")):
            async with aiohttp.ClientSession(server.url, cookie_jar=aiohttp.CookieJar(unsafe=True)) as http:
                async with http.get("/"):
                    pass
                async with http.post("/v1/jobs", json=CHAT, headers=own_origin(server) | {"X-Forwarded-For": address}) as answer:
                    statuses.append(answer.status)
    assert statuses == ([202, 429] if counted == "one" else [202, 202])


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.168.1.7", "192.168.1.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("not an address", "not an address"),
    ],
)
def test_one_household_is_one_address(address: str, network: str) -> None:
    assert network_of(address) == network
