"""`--processes N` as an operator runs it: one port, one Redis, one supervisor."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from mixtral_server.accounts import Accounts
from mixtral_server.apikeys import prefix_of
from mixtral_server.database import Database
from mixtral_server.metrics import Metrics
from mixtral_server.siblings import Siblings
from support.http import until
from support.scripted_worker import ScriptedWorker, answer_to

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
CHAT = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 50}


class Crew:
    """A supervisor with two processes."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], url: str, printed: str) -> None:
        self.folder = folder
        self.process = process
        self.url = url
        self.printed = printed

    def key(self, scope: str) -> str:
        found = re.search(rf"MIXTRAL_{scope.upper()}_KEY=(\S+)", (self.folder / "data" / "keys.env").read_text())
        assert found is not None
        return found[1]

    @property
    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def servers(self) -> list[psutil.Process]:
        """Those that take requests; the other child is Redis."""
        return [one for one in self.family if "mixtral_server.process" in " ".join(one.cmdline())]

    @property
    def redis(self) -> psutil.Process:
        (one,) = [one for one in self.family if "redis" in one.name()]
        return one

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def http(self, scope: str = "client") -> aiohttp.ClientSession:
        """Each request on a connection of its own, so that any process may get it."""
        headers = {"Authorization": f"Bearer {self.key(scope)}"}
        return aiohttp.ClientSession(self.url, headers=headers, connector=aiohttp.TCPConnector(force_close=True, limit=0))

    async def metrics(self) -> str:
        async with self.http() as http, http.get("/metrics") as answer:
            return await answer.text()


@contextmanager
def crew(folder: Path, *words: str, program: tuple[str, ...] = ("-m", "server")) -> Iterator[Crew]:
    command = [sys.executable, *program, "--port", "0", "--data_dir", str(folder / "data"), "--processes", "2", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    assert process.stdout is not None
    family: list[psutil.Process] = []
    try:
        printed = ""
        for line in process.stdout:
            printed += line
            if found := re.search(r"listens on (http://\S+)", line):
                running = Crew(folder, process, found[1], printed)
                family = running.family
                yield running
                break
        else:
            raise AssertionError(f"ended with {process.wait()}: {(folder / 'log').read_text()}")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(START_S)
        process.stdout.close()
        for one in family:
            if one.is_running():
                one.kill()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Crew]:
    with crew(tmp_path, "--ready_delay_s", "0.1", "--shutdown_grace_s", "5", "--client_grace_s", "1") as running:
        yield running


async def chat(http: aiohttp.ClientSession, content: str, **more: object) -> str:
    body = CHAT | {"messages": [{"role": "user", "content": content}]} | more
    async with http.post("/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return str((await answer.json())["choices"][0]["message"]["content"])


@asynccontextmanager
async def worker_of(crew: Crew) -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker(crew.url, crew.key("worker")) as worker:
        yield worker


def counted(text: str, name: str) -> dict[str, float]:
    """Process → sum of that metric's samples."""
    sums: dict[str, float] = {}
    for process, value in re.findall(rf'^{name}\{{[^}}]*process="(\d+)"[^}}]*\}} (\S+)$', text, re.M):
        sums[process] = sums.get(process, 0.0) + float(value)
    return sums


async def test_processes_serve_chats_together_behind_one_message_one_port_and_one_redis(two: Crew) -> None:
    assert len(re.findall(r"listens on http://127\.0\.0\.1:\d+ with 2 processes\n", two.printed)) == 1
    assert two.printed.count("MIXTRAL_CLIENT_KEY=") == 1
    assert len(two.servers) == 2
    assert two.redis.ppid() == two.process.pid, "no process that dies takes it along"
    async with two.http() as http, worker_of(two):
        answers = await asyncio.gather(*(chat(http, f"chat {number}") for number in range(40)))
        assert answers == [answer_to(f"chat {number}") for number in range(40)]
        shown = [await two.metrics() for _ in range(6)]  # whichever process answers
    for text in shown:
        requests = counted(text, "mixtral_http_requests_total")
        assert requests.keys() == {"0", "1"}
        assert min(requests.values()) > 0
        assert counted(text, "mixtral_jobs_put_total") == counted(shown[0], "mixtral_jobs_put_total")
        assert counted(text, "mixtral_process_up") == {"0": 1.0, "1": 1.0}
        assert re.search(r'^mixtral_jobs_ended_total\{endpoint="mixtral_chat",state="done"\} 40\.0$', text, re.M), "Redis's are not summed"
        assert text.count("# TYPE mixtral_http_requests_total ") == 1
    assert sum(counted(shown[0], "mixtral_jobs_put_total").values()) == 40


async def test_killed_process_loses_no_chat_and_is_started_again(two: Crew) -> None:
    async with two.http() as http, worker_of(two) as worker:
        worker.pause_after = 3
        ids = []
        for number in range(12):
            async with http.post("/v1/jobs", json=CHAT | {"messages": [{"role": "user", "content": f"chat {number}"}]}) as answer:
                ids.append((await answer.json())["id"])
        before = {one.pid for one in two.servers}
        victim = two.servers[0]
        victim.kill()
        worker.go.set()
        for number, job_id in enumerate(ids):
            async with asyncio.timeout(30):
                while True:
                    try:
                        async with http.get(f"/v1/jobs/{job_id}") as answer:
                            job = await answer.json()
                            if job["state"] == "done":
                                break
                    except aiohttp.ClientConnectionError:
                        pass  # it was on its way to the one that was killed
                    await asyncio.sleep(0.02)
            assert job["text"] == answer_to(f"chat {number}")
        await until(lambda: two.said().count("event=started host=127.0.0.1") == 3 + 1)  # two, the supervisor's, the new one
        assert "event=process_died process=" in two.said()
        now = {one.pid for one in two.servers}
        assert len(now) == 2
        assert victim.pid not in now
        assert len(now & before) == 1
        assert counted(await two.metrics(), "mixtral_process_up") == {"0": 1.0, "1": 1.0}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_one_signal_to_the_supervisor_ends_all_and_leaves_no_orphan(two: Crew, signum: signal.Signals) -> None:
    family = two.family
    assert len(family) == 3
    async with two.http() as http, worker_of(two) as worker:
        worker.pause_after = 3
        running = asyncio.create_task(chat(http, "finishes within the grace"))
        await until(lambda: bool(worker.seen))
        two.process.send_signal(signum)
        await until(lambda: two.said().count("event=draining") == 2)
        worker.go.set()
        assert await running == answer_to("finishes within the grace")
    assert await asyncio.to_thread(two.process.wait, 60) == 0
    assert not any(one.is_running() for one in family)
    assert "level=ERROR" not in two.said()


async def test_supervisor_that_is_killed_leaves_no_orphan(two: Crew) -> None:
    family = two.family
    two.process.kill()
    await until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family))
    assert two.said().count("event=supervisor_gone") == 2


async def test_revoked_key_is_refused_by_every_process_within_5_s(two: Crew) -> None:
    database = Database(f"sqlite+aiosqlite:///{two.folder / 'data' / 'mixtral.sqlite3'}")
    accounts = Accounts(database)
    key = await accounts.create_key(user="mallory", name="stolen", scopes=["client"], now_s=time.time())
    headers = {"Authorization": f"Bearer {key}"}
    async with two.http() as http:

        async def statuses() -> set[int]:
            async def one() -> int:
                async with http.get("/v1/models", headers=headers) as answer:
                    return answer.status

            return set(await asyncio.gather(*(one() for _ in range(16))))

        assert await statuses() == {200}
        await accounts.revoke_key(prefix_of(key), time.time())
        await database.close()
        async with asyncio.timeout(3 * 5):  # a hang guard: three times the promise
            while await statuses() != {401}:  # noqa: ASYNC110 - the server's own clock decides
                await asyncio.sleep(0.05)
        assert await statuses() == {401}
        assert min(counted(await two.metrics(), "mixtral_http_requests_total").values()) > 0


async def test_process_that_hangs_is_shown_as_down_and_the_others_numbers_are(two: Crew) -> None:
    hanging = two.servers[0]
    hanging.suspend()
    try:
        text = ""
        while not text:
            try:
                async with asyncio.timeout(3):
                    text = await two.metrics()
            except TimeoutError:
                pass  # the connection was dealt to the one that hangs
    finally:
        hanging.resume()
    assert sorted(counted(text, "mixtral_process_up").values()) == [0.0, 1.0]
    assert len(counted(text, "mixtral_connections")) == 1


def test_what_is_wrong_with_the_settings_is_said_once_and_ends_with_1(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ended with 1") as ended, crew(tmp_path, "--redis_url", f"unix://{tmp_path}/none.sock"):
        pass
    assert str(ended.value).count("mixtral-server: ") == 1


def test_port_of_another_server_is_refused_even_if_that_one_shares_it(two: Crew, tmp_path: Path) -> None:
    port = two.url.rpartition(":")[2]
    (tmp_path / "other").mkdir()
    with pytest.raises(AssertionError, match=f"port {port} on 127.0.0.1 cannot be used"), crew(tmp_path / "other", "--port", port):
        pass


def test_processes_that_inherit_one_socket_serve_it_too(tmp_path: Path) -> None:
    """As they do where the kernel does not spread connections over sockets."""
    program = "from mixtral_server import cli, supervisor; supervisor.supervise.__kwdefaults__['binds_each'] = False; cli.main()"
    with crew(tmp_path, program=("-c", program)) as running:
        statuses = []
        for _ in range(5):
            answered = subprocess.run(
                [sys.executable, "-c", f"import urllib.request as r; print(r.urlopen('{running.url}/readyz').status)"],
                capture_output=True,
                text=True,
                check=True,
            )
            statuses.append(answered.stdout.strip())
        assert statuses == ["200"] * 5
        running.process.terminate()
        assert running.process.wait(60) == 0


# ---------------------------------------------------------------------------------------------- numbers


async def test_numbers_of_processes_stand_side_by_side(tmp_path: Path) -> None:
    mine, other = Metrics(), Metrics()
    for metrics, times in ((mine, 1), (other, 2)):
        for _ in range(times):
            metrics.requests.labels("GET", "/", "200").inc()
    here, there = Siblings(tmp_path, 0, 3), Siblings(tmp_path, 1, 3)
    async with here.telling(mine.numbers), there.telling(other.numbers):
        told = await here.ask()
    assert told == {1: told[1], 2: None}
    text = mine.render({}, processes={0: mine.numbers(), **told}).decode()
    assert counted(text, "mixtral_http_requests_total") == {"0": 1.0, "1": 2.0}
    assert counted(text, "mixtral_process_up") == {"0": 1.0, "1": 1.0, "2": 0.0}


async def test_socket_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    first, again, other = Siblings(tmp_path, 0, 2), Siblings(tmp_path, 0, 2), Siblings(tmp_path, 1, 2)
    telling: Callable[[], bytes] = lambda: b"old"  # noqa: E731
    async with first.telling(telling), again.telling(lambda: b"new"):
        assert await other.ask() == {0: b"new"}
