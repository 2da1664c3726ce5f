"""`make smoke`: the demo on a free port and a temporary data folder; one chat by the real openai package, one by the page in a browser.

Prints both answers and their tokens per second. Exit code 0 only if both came.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI
from playwright.sync_api import sync_playwright

import demo
from support.chromium import launch_options

PROMPT = "Tell a long story: Once upon a time"
ANSWER_LIMIT_MS = 120_000
LEAST_WORDS = 20


class SmokeError(Exception):
    """An answer did not come, or is no answer."""


def chat_by_openai_package(url: str, key: str) -> tuple[str, int, float]:
    """Stream one chat → its text, its tokens by the server's count, seconds."""
    client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=ANSWER_LIMIT_MS / 1000)
    began = time.perf_counter()
    text, tokens, finish = "", 0, None
    stream = client.chat.completions.create(
        model=demo.ENDPOINT,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=200,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    if finish not in ("stop", "length"):
        raise SmokeError(f"the openai package's stream ended with finish_reason {finish!r}")
    return text, tokens, time.perf_counter() - began


def chat_by_page(url: str) -> tuple[str, str]:
    """Type the prompt into the page in headless Chromium → the answer and the line of figures under it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("Message", exact=True).fill(PROMPT)
        page.get_by_role("button", name="Send").click()
        answer = page.locator("[data-role=assistant][data-state=done]")
        answer.wait_for(timeout=ANSWER_LIMIT_MS)
        text, figures = answer.locator("[data-part=text]").inner_text(), answer.locator("[data-part=figures]").inner_text()
        browser.close()
    return text, figures


def require_answer(who: str, text: str) -> None:
    if len(text.split()) < LEAST_WORDS:
        raise SmokeError(f"{who} got {len(text.split())} words, fewer than {LEAST_WORDS}: {text!r}")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="mixtral-smoke-") as folder:
        host = "127.0.0.1"
        try:
            with demo.house(host, demo.free_port(host), Path(folder)) as (url, keys):
                text, tokens, seconds = chat_by_openai_package(url, keys["MIXTRAL_CLIENT_KEY"])
                require_answer("the openai package", text)
                print(f"\n--- by the openai package: {tokens} tokens, {tokens / seconds:.1f} tokens/s\n{text}\n", flush=True)
                text, figures = chat_by_page(url)
                require_answer("the page", text)
                print(f"--- by the page in Chromium: {figures}\n{text}\n", flush=True)
        except (demo.DemoError, SmokeError) as error:
            print(f"smoke failed: {error}", file=sys.stderr)
            return 1
    print("smoke passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
