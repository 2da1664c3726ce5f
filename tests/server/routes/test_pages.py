"""The page and what it is served with: its files, strict headers, nothing beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mixtral_server.settings import shipped
from support.live_server import LiveServer

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(f"/page/{path.name}" for path in (ROOT / "frontend").iterdir() if path.suffix in (".js", ".css", ".svg")) + [
    f"/client/{path.name}" for path in sorted((ROOT / "clients" / "javascript").glob("*.js"))
]


async def test_page_is_the_shipped_one_and_asks_for_nothing_but_itself(http: aiohttp.ClientSession) -> None:
    async with http.get("/") as answer:
        assert (answer.status, answer.content_type) == (200, "text/html")
        assert await answer.read() == (ROOT / "frontend" / "index.html").read_bytes()
        policy = dict(rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
    assert (policy["frame-ancestors"], policy["base-uri"], policy["require-trusted-types-for"]) == ("'none'", "'none'", "'script'")
    assert "unsafe" not in str(policy)


async def test_every_address_that_the_page_names_is_served(http: aiohttp.ClientSession) -> None:
    page = (ROOT / "frontend" / "index.html").read_text()
    named = [address for address in re.findall(r'(?:href|src)="([^"]+)"', page) if not address.startswith("#")]
    assert len(named) >= 3
    for address in named:
        async with http.get(f"/{address}") as answer:
            assert answer.status == 200, address


@pytest.mark.parametrize("path", FILES)
async def test_file_of_the_page_has_its_type_and_is_asked_about_each_time(http: aiohttp.ClientSession, path: str) -> None:
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    async with http.get(path) as answer:
        assert (answer.status, answer.content_type) == (200, kinds[path.rsplit(".", 1)[1]])
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        etag = answer.headers["ETag"]
    async with http.get(path, headers={"If-None-Match": etag}) as answer:
        assert (answer.status, await answer.read()) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/page/../keys.env",
        "/page/..%2f..%2fdata%2fkeys.env",
        "/page/%2e%2e%2fpyproject.toml",
        "/page/package.json",
        "/page/.hidden.js",
        "/page/none.js",
        "/page/",
        "/page/index.html%00.js",
        "/client/package.json",
        "/client/..%2fpython%2fmixtral_client%2fclient.py",
        "/page/%2fetc%2fpasswd",
    ],
)
async def test_nothing_else_is_served(server: LiveServer, path: str) -> None:
    async with aiohttp.ClientSession() as http, http.get(aiohttp.client.URL(server.url + path, encoded=True)) as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "route_not_found"


async def test_page_settings_say_model_defaults_and_limits(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/page") as answer:
        page: dict[str, Any] = await answer.json()
    assert page["public"] is True
    assert page["model"] == "mixtral_chat"
    assert page["max_tokens"] == {"default": 512, "max": 32_768}
    assert page["temperature"] == {"default": 0.8, "min": 0, "max": 2}


async def test_page_that_is_not_public_says_so(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis) as server:
        async with aiohttp.ClientSession(server.url) as http, http.get("/v1/page") as answer:
            assert (await answer.json())["public"] is False


async def test_other_folders_can_be_served_instead(empty_redis: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>mine")
    (tmp_path / "mine.js").write_text("export {};")
    folder = str(tmp_path)
    with LiveServer(tmp_path / "data", empty_redis, frontend_dir=folder, javascript_dir=folder) as server:
        async with aiohttp.ClientSession(server.url) as http:
            for path in ("/", "/page/mine.js", "/client/mine.js"):
                async with http.get(path) as answer:
                    assert answer.status == 200
                    assert (await answer.text()) in ("<!doctype html>mine", "export {};")


def test_shipped_folders_are_those_of_the_checkout_here() -> None:
    assert shipped("frontend", "frontend") == ROOT / "frontend"
    assert shipped("nothing", "frontend").parts[-3:] == ("share", "mixtral-chat", "frontend")
