"""What the page's tests run against: the real server in its own process, a worker that a test plays by hand, headless Chromium."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from mixtral_client.protocol import PROTOCOL_VERSION
from support.chromium import launch_options

REPOSITORY = Path(__file__).resolve().parents[2]
ENDPOINT = "mixtral_chat"
START_LIMIT_S = 30.0
REPORT_BREACHES = "addEventListener('securitypolicyviolation', (e) => console.error('CSP breach', e.effectiveDirective, e.blockedURI))"
ANSWER_LIMIT_S = 40.0  # a turn waits up to 25 s for work


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class House:
    """One `python -m server` on a free port, with a data folder of its own; it can be stopped and started again."""

    def __init__(self, data_dir: Path, *flags: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags = flags

    def start(self) -> None:
        command = [sys.executable, "-m", "server", "--port", str(self.port), "--data_dir", str(self.data_dir)]
        command += ["--ready_delay_s", "0", *self._flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")}
        with (self.data_dir / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_LIMIT_S
        while not self._is_ready():
            if self._has_ended_within(0.05) or time.monotonic() > deadline:
                raise AssertionError(f"the server is not ready within {START_LIMIT_S:.0f} s; its log: {self.log()}")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=START_LIMIT_S)

    def log(self) -> str:
        return (self.data_dir / "server.log").read_text()

    def key(self, name: str) -> str:
        lines = (self.data_dir / "keys.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))[name]

    def _has_ended_within(self, seconds: float) -> bool:
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False


class HandWorker:
    """A worker on the native wire that does what a test tells it, one turn at a time; token ids are those of the alphabet."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._turn = 0
        self._held: dict[str, dict[str, Any]] = {}
        self._dropped: set[str] = set()
        body = {"endpoint": ENDPOINT, "name": "by hand", "protocol": PROTOCOL_VERSION, "version": "0", "model": "none", "device": "none"}
        self._session = self._post("/v1/worker/sessions", {**body, "max_slots": 4, "max_seq_len": 1024})["session"]

    def take(self) -> dict[str, Any]:
        """The next job, waited for."""
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while time.monotonic() < deadline:
            for job in self._exchange(room=1)["jobs"]:
                self._held[job["id"]] = {**job, "next": len(job["produced_ids"]) + 1}
                return dict(job)
        raise AssertionError(f"no job came within {ANSWER_LIMIT_S:.0f} s")

    def say(self, job: dict[str, Any], *texts: str) -> None:
        self._report(job, texts)

    def finish(self, job: dict[str, Any], *texts: str, finish: str = "stop") -> None:
        self._report(job, texts, finish=finish)
        self._held.pop(job["id"], None)

    def fail(self, job: dict[str, Any], code: str, message: str) -> None:
        self._report(job, (), error={"code": code, "message": message})
        self._held.pop(job["id"], None)

    def wait_for_drop(self, job: dict[str, Any]) -> None:
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while job["id"] not in self._dropped:
            assert time.monotonic() < deadline, f"the server did not ask for {job['id']} to be dropped"
            self._exchange()

    def leave(self) -> None:
        """Log out, once; what is held goes back to the queue."""
        if self._session:
            self._ask("DELETE", f"/v1/worker/sessions/{self._session}")
        self._session = ""

    def _report(self, job: dict[str, Any], texts: tuple[str, ...], **end: Any) -> None:
        held = self._held[job["id"]]
        ids = [held["next"] + index for index in range(len(texts))]
        frame = {"job": job["id"], "attempt": job["attempt"], "offset": held["next"], "ids": ids, "texts": texts, "prompt_tokens": 3, **end}
        held["next"] += len(texts)
        answer = self._exchange(frames=[frame])
        assert not answer["expect"], answer

    def _exchange(self, room: int = 0, frames: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        self._turn += 1
        holding = [[job["id"], job["attempt"]] for job in self._held.values()]
        answer = self._post(
            "/v1/worker/turn",
            {"session": self._session, "turn": self._turn, "holding": holding, "frames": frames or [], "room": room},
        )
        for drop in answer["drops"]:
            self._dropped.add(drop["job"])
            self._held.pop(drop["job"], None)
        return answer

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._ask("POST", path, json.dumps(body).encode()))
        return answer

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Authorization": f"Bearer {self._house.key('MIXTRAL_WORKER_KEY')}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._house.url + path, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as answer:
            content: bytes = answer.read()
            return content


@pytest.fixture(scope="module")
def start_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., House]]:
    houses: list[House] = []

    def start(*flags: str) -> House:
        house = House(tmp_path_factory.mktemp("house"), *flags)
        houses.append(house)
        house.start()
        return house

    yield start
    for house in houses:
        house.stop()


@pytest.fixture(scope="module")
def house(start_house: Callable[..., House]) -> House:
    """A server whose visitors need no key."""
    return start_house("--public_page", "--visitor_requests_per_minute", "1000", "--address_requests_per_minute", "1000")


@pytest.fixture(scope="module")
def private_house(start_house: Callable[..., House]) -> House:
    """A server that asks for a key."""
    return start_house()


@pytest.fixture
def join(house: House) -> Iterator[Callable[..., HandWorker]]:
    """Log a worker in; it is logged out after the test."""
    workers: list[HandWorker] = []

    def start(house: House = house) -> HandWorker:
        workers.append(HandWorker(house))
        return workers[-1]

    yield start
    for worker in workers:
        worker.leave()


@pytest.fixture
def worker(join: Callable[..., HandWorker]) -> HandWorker:
    return join()


# Module scope, not session: while playwright's loop is alive no other asyncio test can run in this thread.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = launch_options()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, house: House) -> Iterator[Callable[..., Page]]:
    """Open the page as a new visitor. A breach of the content policy, or an error of a script, fails the test that saw it."""
    complaints: list[str] = []
    contexts: list[BrowserContext] = []

    def open_new(house: House = house, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        context.add_init_script(REPORT_BREACHES)
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        context.on("console", lambda message: complaints.append(message.text) if is_complaint(message.text) else None)
        page = context.new_page()
        page.goto(house.url)
        return page

    yield open_new
    for context in contexts:
        for page in context.pages:
            leave_no_job(page)
        context.close()
    assert complaints == []


def leave_no_job(page: Page) -> None:
    """A test that failed half-way must not leave its job to the next test's worker. A server that is gone has no next test."""
    page.evaluate(
        """async () => {
             const job = JSON.parse(sessionStorage.getItem("mixtral.chat") ?? "{}").exchanges?.at(-1)?.answer.job;
             if (job) await fetch(`/v1/jobs/${job}`, { method: "DELETE" }).catch(() => null);
           }"""
    )


def is_complaint(text: str) -> bool:
    """Failed requests are logged by Chromium itself and are some tests' purpose; everything else on the console is a fault."""
    return not text.startswith("Failed to load resource")


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()
