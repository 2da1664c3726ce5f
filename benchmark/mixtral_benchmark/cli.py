"""`python -m benchmark`, `mixtral-benchmark`: flags in, one run, a table and one JSON line out.

Decides the flags, what is checked before any load, the order of a run and the exit code. Leaves sending to load.py, figures to
measure.py and words to report.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import aiohttp
from rich.console import Console
from yarl import URL

from mixtral_benchmark import report
from mixtral_benchmark.load import Load, MonotonicClock, Plan
from mixtral_benchmark.measure import figures
from mixtral_benchmark.progress import Shown, note_silence, shown
from mixtral_benchmark.prompts import START_PROMPT, asks
from mixtral_benchmark.wires import CONNECT_TIMEOUT_S, NativeWire, OpenAIWire, ServerFacts, Target, Wire, ask_server, open_http
from mixtral_client.errors import MixtralError, NotAllowed, NotAuthenticated

OK, SOME_FAILED, NOT_RUN, INTERRUPTED = 0, 1, 2, 130
DEFAULT_CONCURRENCY = 16
TABLE_COLUMNS = 120
"""Width of the table where stdout is no terminal and says none."""

DESCRIPTION = """\
Send many chats at once to a running server and measure, from this side of the network, how fast their tokens come.

Progress goes to stderr, a table to stdout, and the last line of stdout is one JSON object with every figure
(keys as `vllm bench serve` names them). docs/benchmarking.md says what each figure means."""

EPILOG = """\
examples
  python -m benchmark --total_requests 64 --concurrent_requests 16
        16 chats at a time until 64 are done; asks a slow server less
  python -m benchmark --total_requests 500 --request_rate 2
        two new chats a second at random moments, as many users would send them, however slow the server is
  python -m benchmark --total_requests 64 --verify
        also checks every stream against the server's log of the chat
  python -m benchmark --api_server http://gpu-box:8000 --endpoint_name mistralai/Mixtral-8x7B-Instruct-v0.1
        any other server that speaks OpenAI's API

exit code
  0 every chat completed   1 some failed (the table names why)   2 nothing was sent   130 interrupted with Ctrl-C"""


class NotRun(Exception):
    """No load was sent; the message is the one sentence a person sees."""


@dataclass(frozen=True)
class Flags:
    """One run, as asked for. Everything but the key goes into the result."""

    api_server: str
    endpoint_name: str
    api: str
    verify: bool
    total_requests: int
    concurrent_requests: int | None
    request_rate: float | None
    warmup_requests: int
    timeout_s: float
    prompt: str
    max_tokens: int
    temperature: float | None
    seed: int | None
    json_file: Path | None

    def shown(self) -> dict[str, object]:
        return asdict(self) | {"json_file": self.json_file and str(self.json_file)}

    @property
    def load_in_words(self) -> str:
        if self.request_rate is None:
            pace = f"{min(self.concurrent_requests or self.total_requests, self.total_requests)} at once"
        else:
            cap = f"at most {self.concurrent_requests} at once" if self.concurrent_requests else "however many are open"
            pace = f"{self.request_rate:g} a second, {cap}"
        return f"{self.total_requests} chats, {pace}, up to {self.max_tokens} tokens each"


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {text}")
    return number


def count_or_zero(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more; got {text}")
    return number


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0; got {text}")
    return number


def temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError(f"must be 0 (greedy) to 2; got {text}")
    return number


def server_url(text: str) -> str:
    url = URL(text.rstrip("/"))
    if url.scheme not in ("http", "https") or not url.host:
        raise argparse.ArgumentTypeError(f"must be http://HOST:PORT or https://HOST; got {text!r}")
    if url.user or url.password:
        raise argparse.ArgumentTypeError("must hold no user or password, because results name it; give the key by --api_key")
    return str(url).rstrip("/").removesuffix("/v1")


def parser() -> argparse.ArgumentParser:
    """Every flag. The short ones are those of AIME's benchmark tool, where they mean the same."""
    parser = argparse.ArgumentParser(
        prog="mixtral-benchmark",
        usage="python -m benchmark --api_server URL --total_requests N [more flags]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    target = parser.add_argument_group("target")
    target.add_argument("-as", "--api_server", type=server_url, default="http://127.0.0.1:7777", metavar="URL", help="default %(default)s")
    target.add_argument(
        "-ep", "--endpoint_name", default="mixtral_chat", metavar="NAME", help="the model id to ask for; default %(default)s"
    )
    target.add_argument("-k", "--api_key", metavar="KEY", help="a client key; default the environment's MIXTRAL_CLIENT_KEY")
    target.add_argument(
        "--api",
        choices=("openai", "native"),
        help="openai: /v1/chat/completions; native: /v1/jobs, with the server's own timings; default openai",
    )
    target.add_argument(
        "--verify", action="store_true", help="compare each stream with the server's log of its job; the API is then native"
    )

    load = parser.add_argument_group("load")
    load.add_argument("-tr", "--total_requests", type=count, default=64, metavar="N", help="chats in all; default %(default)s")
    load.add_argument(
        "-cr",
        "--concurrent_requests",
        type=count,
        metavar="N",
        help=f"chats at once; default {DEFAULT_CONCURRENCY}, with --request_rate no cap",
    )
    load.add_argument(
        "--request_rate", type=positive, metavar="PER_S", help="open loop: send this many chats a second at random (Poisson) moments"
    )
    load.add_argument(
        "--warmup_requests",
        type=count_or_zero,
        default=1,
        metavar="N",
        help="chats before the clock starts, not counted; default %(default)s",
    )
    load.add_argument(
        "--timeout_s", type=positive, default=600, metavar="S", help="a chat not finished by then has failed; default %(default)s"
    )

    chat = parser.add_argument_group("each chat")
    chat.add_argument("--prompt", default=START_PROMPT, metavar="TEXT", help="default %(default)r")
    chat.add_argument(
        "-nu", "--max_tokens", "--num_units", type=count, default=500, metavar="N", help="most tokens to generate; default %(default)s"
    )
    chat.add_argument("--temperature", type=temperature, metavar="T", help="0 is greedy; default the endpoint's own")
    chat.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="chat i draws with seed N+i, and the moments of --request_rate with N; default: the server draws, moments 0",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json_file", type=Path, metavar="PATH", help="also write the JSON object, with a row per chat, to this file")
    return parser


def parse(argv: Sequence[str] | None, environment: Mapping[str, str]) -> tuple[Flags, Target]:
    """Flags and where they go. Leaves by SystemExit(2) with a sentence when they contradict each other."""
    reader = parser()
    given = reader.parse_args(argv)
    if given.verify and given.api == "openai":
        reader.error("--verify compares native streams with the log of their job; leave out --api openai")
    if given.json_file and not given.json_file.parent.is_dir():
        reader.error(f"--json_file: the folder {given.json_file.parent} does not exist; make it first")
    values = {name: value for name, value in vars(given).items() if name != "api_key"}
    flags = Flags(**values | {"api": given.api or ("native" if given.verify else "openai")})
    if flags.request_rate is None and flags.concurrent_requests is None:
        flags = replace(flags, concurrent_requests=DEFAULT_CONCURRENCY)
    return flags, Target(flags.api_server, flags.endpoint_name, given.api_key or environment.get("MIXTRAL_CLIENT_KEY"))


async def check(http: aiohttp.ClientSession, target: Target) -> ServerFacts:
    """Reach the server, show the key, find the endpoint. Raises NotRun."""
    try:
        server = await ask_server(http, target)
    except NotAuthenticated as refused:
        key = "the key given" if target.key else "a missing key"
        raise NotRun(f"{target.url} refuses {key}: {refused}; give a client key by --api_key or MIXTRAL_CLIENT_KEY") from refused
    except NotAllowed as refused:
        raise NotRun(f"{target.url} does not let this key list or use models: {refused}; give a client key by --api_key") from refused
    except MixtralError as refused:
        raise NotRun(f"{target.url} answered {refused.status}: {refused}; is it this service, or another with OpenAI's API?") from refused
    except (aiohttp.ClientError, TimeoutError) as unreached:
        raise NotRun(f"cannot reach {target.url} ({reason(unreached)}); is the server running, and is --api_server right?") from unreached
    except ValueError as unreadable:
        raise NotRun(f"{target.url}/v1/models answered something else than a list of models; is --api_server right?") from unreadable
    if target.endpoint not in server.endpoints:
        known = ", ".join(server.endpoints) or "none"
        raise NotRun(f"{target.url} has no endpoint {target.endpoint!r}; it has: {known}; choose by --endpoint_name")
    return server


def reason(unreached: Exception) -> str:
    if isinstance(unreached, OSError) and unreached.errno and unreached.errno > 0:
        return os.strerror(unreached.errno)
    return getattr(unreached, "strerror", None) or str(unreached) or f"no answer within {CONNECT_TIMEOUT_S} s"


class Run:
    """One benchmark: check, warm up, load. load holds what was measured, also after an interruption."""

    def __init__(self, flags: Flags, target: Target, console: Console) -> None:
        self._flags, self._target, self._console = flags, target, console
        self._clock = MonotonicClock()
        self.server: ServerFacts | None = None
        self.load: Load | None = None
        self.cpu_share = 0.0

    async def __call__(self) -> None:
        async with open_http(self._target) as http:
            self.server = server = await check(http, self._target)
            self._say(f"target   {self._target.url}, endpoint {self._target.endpoint}, by its {self._flags.api} API")
            self._say(f"load     {self._flags.load_in_words}")
            if server.workers == 0:
                self._say("no worker is logged in, so every chat will wait for one; start it with torchrun worker")
            await self._warm_up(http)
            await self._measure(http)

    async def _warm_up(self, http: aiohttp.ClientSession) -> None:
        if not self._flags.warmup_requests:
            return
        with shown("warm-up", self._flags.warmup_requests, self._clock.now, self._console) as watcher:
            load = self._load(http, watcher, replace(self._flags, total_requests=self._flags.warmup_requests, request_rate=None))
            await self._run(load, watcher)
        failed = next((chat.failure for chat in load.chats if chat.failure), None)
        if failed:
            raise NotRun(f"a warm-up chat failed, so the load was not sent: {failed.code}: {failed.message}")

    async def _measure(self, http: aiohttp.ClientSession) -> None:
        cpu_s = time.process_time()
        with shown("chats", self._flags.total_requests, self._clock.now, self._console) as watcher:
            self.load = load = self._load(http, watcher, self._flags)
            try:
                await self._run(load, watcher)
            finally:
                self.cpu_share = (time.process_time() - cpu_s) / max(load.ended_s - load.started_s, 1e-9)

    async def _run(self, load: Load, watcher: Shown) -> None:
        async with asyncio.TaskGroup() as beside:
            silence = beside.create_task(note_silence(watcher, self._clock))
            await load.run()
            silence.cancel()

    def _load(self, http: aiohttp.ClientSession, watcher: Shown, flags: Flags) -> Load:
        wire: Wire
        if flags.api == "native":
            wire = NativeWire(http, self._target, self._clock.now, watcher.arrived, verify=flags.verify)
        else:
            wire = OpenAIWire(http, self._target, self._clock.now, watcher.arrived)
        chats = asks(flags.total_requests, flags.prompt, flags.max_tokens, flags.temperature, flags.seed)
        return Load(
            Plan(chats, flags.concurrent_requests, flags.request_rate, flags.seed or 0, flags.timeout_s), wire, self._clock, watcher
        )

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


async def benchmark(flags: Flags, target: Target) -> int:
    """Run, print, and give the exit code. Ctrl-C ends the load, not the report."""
    run = Run(flags, target, Console(stderr=True))
    interrupted = False
    try:
        await run()
    except NotRun as refused:
        print(refused, file=sys.stderr)
        return NOT_RUN
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.uncancel() > 0:
            raise
        interrupted = True
    if run.load is None:
        print("interrupted before the load began; nothing was measured", file=sys.stderr)
        return INTERRUPTED
    is_published = publish(flags, run, run.load)
    if interrupted:
        return INTERRUPTED
    return SOME_FAILED if not is_published or any(chat.failure for chat in run.load.chats) else OK


def publish(flags: Flags, run: Run, load: Load) -> bool:
    """Table, the JSON object as the last line, then the file; False if that could not be written."""
    measured = figures(load.chats, load.started_s, load.ended_s)
    outcome = report.result(load.chats, measured, report.circumstances(flags.shown(), run.server), run.cpu_share)
    out = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
    report.show(out, load.chats, outcome)
    print(report.json_line(outcome), flush=True)
    if flags.json_file:
        try:
            report.write_json(flags.json_file, outcome, report.chat_rows(load.chats, load.started_s))
        except OSError as unwritten:
            print(f"--json_file {flags.json_file} could not be written ({unwritten.strerror}); stdout has the result", file=sys.stderr)
            return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    flags, target = parse(argv, os.environ)
    try:
        code = asyncio.run(benchmark(flags, target))
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)
