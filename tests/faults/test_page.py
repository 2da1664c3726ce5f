"""A real browser behind nginx: its page goes on with an answer across a reload and the death of the replica that streamed it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from support.chromium import launch_options
from support.house import House
from support.nginx import Nginx
from support.ports import free_port

ENDPOINT = "mixtral_chat"
PATIENCE_MS = 60_000


@pytest.mark.timeout(300)
def test_reload_while_streaming_and_a_killed_replica_cost_the_page_no_letter(tmp_path: Path) -> None:
    house = House(tmp_path / "house", replicas=3, leases_s={ENDPOINT: 8.0}, more_flags=("--public_page",))
    with house, Nginx(tmp_path / "nginx", free_port(), house.urls) as nginx:
        asyncio.run(house.hire(nginx.url, endpoint=ENDPOINT, token_ms=25))
        with sync_playwright() as playwright, playwright.chromium.launch(**launch_options()) as browser:
            page = browser.new_page()
            page.goto(nginx.url)
            with page.expect_response(lambda answer: answer.url.endswith("/v1/jobs")) as submitted:
                page.get_by_role("textbox").first.fill("tell me of the sea")
                page.keyboard.press("Enter")
            job_id = submitted.value.json()["id"]
            seen = ""
            for replica in house.replicas[:2]:
                seen = grown(page, seen)
                replica.kill()
                page.reload()
                seen = grown(page, seen)
            expect(answer(page)).to_have_attribute("data-state", "done", timeout=PATIENCE_MS)
            shown, job = page.evaluate(
                """async (id) => [document.querySelector("[data-role=assistant] [data-part=text]").textContent,
                                  await (await fetch(`/v1/jobs/${id}`)).json()]""",
                job_id,
            )
    assert (job["state"], shown.strip()) == ("done", job["text"].strip())
    assert shown.startswith(seen.strip())


def answer(page: Page):  # type: ignore[no-untyped-def]
    return page.locator("[data-role=assistant]").last


def grown(page: Page, seen: str) -> str:
    """The answer as the page shows it, once it begins with what was seen before and is longer."""
    page.wait_for_function(
        """(seen) => { const text = document.querySelector("[data-role=assistant] [data-part=text]")?.textContent ?? "";
                       return text.startsWith(seen) && text.length > seen.length + 40; }""",
        arg=seen,
        timeout=PATIENCE_MS,
    )
    text: str = page.evaluate("""() => document.querySelector("[data-role=assistant] [data-part=text]").textContent""")
    return text.strip()
