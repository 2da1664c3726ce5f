"""One benchmark from first contact to last chat: reach the server, count its tokens, warm up, then a run or a sweep of runs.

Decides the order, what is refused before any load, and when a sweep is over. Leaves sending to load.py, words to prompts.py and
figures to measure.py.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
from rich.console import Console

from mixtral_benchmark import report
from mixtral_benchmark.aime import AimeWire, ask_aime_server
from mixtral_benchmark.arrivals import Pace, moments_s
from mixtral_benchmark.calibrate import Ruler, calibrate
from mixtral_benchmark.chaos import Incident, ResumingWire, break_things, clients_of, costs
from mixtral_benchmark.flags import DEFAULT_REQUESTS, Flags
from mixtral_benchmark.goals import goodput
from mixtral_benchmark.house import House
from mixtral_benchmark.intervals import confidence
from mixtral_benchmark.load import Load, MonotonicClock, Plan
from mixtral_benchmark.measure import Figure, figures
from mixtral_benchmark.progress import Shown, note_silence, shown
from mixtral_benchmark.prompts import (
    FOLLOW_UP,
    LONG_TEXT_TASK,
    PromptFileError,
    Shape,
    Talk,
    read_prompts,
    read_trace,
    same,
    synthetic,
    trace_lengths,
)
from mixtral_benchmark.wires import (
    CONNECT_TIMEOUT_S,
    ChatFailed,
    NativeWire,
    OpenAIWire,
    ServerFacts,
    Target,
    Wire,
    ask_server,
    open_http,
)
from mixtral_client.client import MixtralClient
from mixtral_client.errors import MixtralError, NotAllowed, NotAuthenticated

if sys.platform != "win32":
    import resource

OK, SOME_FAILED, NOT_RUN, INTERRUPTED = 0, 1, 2, 130
"""Exit codes of whatever sends load."""

WORTH_MORE = 1.05
"""More chats at once must bring at least so many times the tokens a second, or the server is saturated."""
OTHER_FILES = 32
"""Open files that are no chat."""
MACOS_FILES = 10_240
"""What a program may ask for where the hard limit is none: OPEN_MAX, as setrlimit(2) of macOS says."""
KEEPS_UP = 0.9
"""A server that ends fewer chats a second than this share of those sent has fallen behind."""


class NotRun(Exception):
    """No load was sent; the message is the one sentence a person sees."""


@dataclass
class Measured:
    """One run that was sent, perhaps not to its end."""

    flags: Flags
    load: Load
    client_cpu_share: float = 0.0
    incidents: list[Incident] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, Figure]:
        load = self.load
        found = figures(load.chats, load.started_s, load.ended_s)
        return found | goodput(load.chats, load.ended_s - load.started_s, self.flags.goals) | {"unsent": load.unsent}

    def outcome(self, server: ServerFacts | None, shown_flags: Flags | None = None) -> dict[str, Any]:
        """The run's JSON object. shown_flags: those that it names, where they are not the ones that it ran with."""
        load, facts = self.load, report.circumstances((shown_flags or self.flags).shown(), server)
        found = report.result(load.chats, self.figures, facts, self.client_cpu_share, confidence(load.chats))
        return found | ({"kills": costs(self.incidents, load.chats, load.started_s)} if self.flags.chaos else {})


class Benchmark:
    """runs holds what was measured, also after an interruption."""

    def __init__(self, flags: Flags, target: Target, console: Console, house: House | None = None) -> None:
        """house: what to break meanwhile; target is then its own."""
        self._flags, self._target, self._console, self._house = flags, target, console, house
        self._clients: list[MixtralClient] = []
        self._clock = MonotonicClock()
        self.server: ServerFacts | None = None
        self.runs: list[Measured] = []
        self.saturated: str | None = None
        """Why a sweep ended before its last level."""

    async def __call__(self) -> None:
        allow_open_files(max(min(run.concurrent_requests or 0, run.total_requests or sys.maxsize) for run in self._flags.runs))
        async with AsyncExitStack() as stack:
            http = await stack.enter_async_context(open_http(self._target))
            if self._house:
                self._clients = await stack.enter_async_context(clients_of(self._house))
            self.server = server = await check(http, self._target, self._flags.api)
            self._say(f"target   {self._target.url}, endpoint {self._target.endpoint}, by its {self._flags.api} API")
            for flags in self._flags.runs:
                self._say(f"load     {flags.in_words}")
            if server.workers == 0:
                self._say("no worker is logged in, so every chat will wait for one; start it with torchrun worker")
            plans = await self._plans(http)
            await self._warm_up(http, plans[0][1])
            for flags, talks in plans:
                await self._measure(http, flags, talks)
                self.saturated = saturation(self.runs)
                if self.saturated:
                    self._say(f"sweep over: {self.saturated}")
                    return

    async def _plans(self, http: aiohttp.ClientSession) -> list[tuple[Flags, list[Talk]]]:
        """Each run and its talks. Raises NotRun where the server cannot count tokens, or a file cannot be used."""
        flags = self._flags
        ruler = None
        try:
            lengths = trace_lengths(flags.trace) if flags.trace else set()
            if lengths or flags.input_tokens or flags.context_length:
                ruler = await self._ruler(http)
            return [(run, talks_of(run, ruler)) for run in flags.runs]
        except PromptFileError as error:
            raise NotRun(str(error)) from error

    async def _ruler(self, http: aiohttp.ClientSession) -> Ruler:
        with shown("counting tokens", 2, self._clock.now, self._console) as watcher:
            try:
                async with asyncio.timeout(self._flags.timeout_s):
                    ruler = await calibrate(self._wire(http, watcher), self._clock.now())
            except (ChatFailed, MixtralError, aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise NotRun(f"a probe for the length of prompts failed: {error or type(error).__name__}") from error
        words, frame = f"{ruler.tokens_per_word:.2f} tokens a word", f"{ruler.frame_tokens:.0f} for the chat's frame"
        self._say(f"prompts  {words} and {frame}, as the server counts")
        return ruler

    async def _warm_up(self, http: aiohttp.ClientSession, talks: Sequence[Talk]) -> None:
        count = self._flags.warmup_requests
        if not count:
            return
        first = [replace(talks[i % len(talks)], at_s=None) for i in range(count)]
        with shown("warm-up", sum(len(talk.turns) for talk in first), self._clock.now, self._console) as watcher:
            plan = Plan(first, self._flags.concurrent_requests or count, None, self._flags.timeout_s)
            load = Load(plan, self._wire(http, watcher), self._clock, watcher)
            await self._send(load, watcher)
        failed = next((chat.failure for chat in load.chats if chat.failure), None)
        if failed:
            raise NotRun(f"a warm-up chat failed, so the load was not sent: {failed.code}: {failed.message}")

    async def _measure(self, http: aiohttp.ClientSession, flags: Flags, talks: Sequence[Talk]) -> None:
        cpu_s = time.process_time()
        with shown("chats", sum(len(talk.turns) for talk in talks), self._clock.now, self._console) as watcher:
            plan = Plan(talks, flags.concurrent_requests, planned_moments_s(flags, talks), flags.timeout_s)
            run = Measured(flags, Load(plan, self._wire(http, watcher), self._clock, watcher))
            self.runs.append(run)
            try:
                await self._send(run.load, watcher, run.incidents)
            finally:
                run.client_cpu_share = (time.process_time() - cpu_s) / max(run.load.ended_s - run.load.started_s, 1e-9)

    async def _send(self, load: Load, watcher: Shown, incidents: list[Incident] | None = None) -> None:
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(note_silence(watcher, self._clock))]
            if self._house and incidents is not None:
                breaking = break_things(self._house, self._clock, self._flags.chaos_every_s, self._flags.seed or 0, incidents)
                beside.append(group.create_task(breaking))
            await load.run()
            for task in beside:
                task.cancel()

    def _wire(self, http: aiohttp.ClientSession, watcher: Shown) -> Wire:
        if self._clients:
            return ResumingWire(self._clients, http, self._target, self._clock.now, watcher.arrived)
        if self._flags.api == "native":
            return NativeWire(http, self._target, self._clock.now, watcher.arrived, verify=self._flags.verify)
        kind = AimeWire if self._flags.api == "aime" else OpenAIWire
        return kind(http, self._target, self._clock.now, watcher.arrived)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def talks_of(flags: Flags, ruler: Ruler | None) -> list[Talk]:
    """The talks of one run; the same flags give the same. Raises PromptFileError."""
    total, seed = flags.total_requests or DEFAULT_REQUESTS, flags.seed or 0
    like = Talk(
        turns=(FOLLOW_UP,) * (flags.turns - 1),
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        seed=flags.seed,
        ignore_eos=flags.ignore_eos,
        think_s=flags.think_s,
    )
    if flags.prompt_file:
        return read_prompts(flags.prompt_file, total, like)
    if flags.trace:
        words_for = ruler.words_of(trace_lengths(flags.trace)) if ruler else {}
        return read_trace(flags.trace, flags.total_requests, flags.trace_speed, like, words_for)
    if ruler and flags.context_length:
        words = ruler.words(flags.context_length - flags.max_tokens) - len(LONG_TEXT_TASK.split())
        long = synthetic(total, Shape(max(1, words)), replace(like, turns=()), seed)
        return [replace(talk, turns=(LONG_TEXT_TASK + talk.turns[0], *like.turns)) for talk in long]
    if ruler and flags.input_tokens:
        prefix_words = round(flags.shared_prefix_tokens / ruler.tokens_per_word)
        return synthetic(total, Shape(ruler.words(flags.input_tokens), prefix_words, flags.prefixes, flags.input_spread), like, seed)
    return same(total, flags.prompt or "", like)


def planned_moments_s(flags: Flags, talks: Sequence[Talk]) -> list[float] | None:
    """When each talk begins; None in a closed loop."""
    if flags.trace:
        return [talk.at_s or 0.0 for talk in talks]
    if flags.request_rate is None:
        return None
    return moments_s(len(talks), Pace(flags.request_rate, flags.burstiness, flags.ramp_to), flags.seed or 0)


def saturation(runs: Sequence[Measured]) -> str | None:
    """Why the last run of a sweep showed that the next would bring nothing; None while it may."""
    last = runs[-1]
    if last.flags.sweep_rate and last.flags.request_rate:
        chats = last.load.chats
        sent, ended = rate([chat.scheduled_s for chat in chats]), rate([chat.ended_s for chat in chats if chat.ended_s is not None])
        if sent and ended and ended < KEEPS_UP * sent:
            return f"of {sent:.2f} chats sent a second, {ended:.2f} came to their end"
    if last.flags.sweep_concurrency and len(runs) > 1:
        before, now = (run.figures["steady_output_throughput"] or 0.0 for run in runs[-2:])
        if now < WORTH_MORE * before:
            return f"{last.flags.concurrent_requests} chats at once brought {now:,.0f} tokens/s after {before:,.0f}"
    return None


def rate(moments_s: Sequence[float]) -> float | None:
    """How many a second, from the first to the last; None where that is no time."""
    span_s = max(moments_s, default=0.0) - min(moments_s, default=0.0)
    return (len(moments_s) - 1) / span_s if span_s > 0 else None


def allow_open_files(chats: int) -> None:
    """Each chat under way is one. A login shell allows 1,024, and a program to ask for more. Raises NotRun where they are too few."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    most = max(soft, MACOS_FILES if hard == resource.RLIM_INFINITY else hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < chats + OTHER_FILES:
        raise NotRun(
            f"{chats:,} chats at once need {chats + OTHER_FILES:,} open files, and this account may have {most:,}: "
            f"raise its hard limit (ulimit -Hn), or ask for at most {most - OTHER_FILES:,} at once"
        )


async def check(http: aiohttp.ClientSession, target: Target, api: str) -> ServerFacts:
    """Reach the server, show the key, find the endpoint. Raises NotRun."""
    try:
        server = await (ask_aime_server(http, target) if api == "aime" else ask_server(http, target))
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
        raise NotRun(f"{target.url} answered something else than a list of models; is --api_server right?") from unreadable
    if server.endpoints and target.endpoint not in server.endpoints:
        known = ", ".join(server.endpoints)
        raise NotRun(f"{target.url} has no endpoint {target.endpoint!r}; it has: {known}; choose by --endpoint_name")
    return server


def reason(unreached: Exception) -> str:
    if isinstance(unreached, OSError) and unreached.errno and unreached.errno > 0:
        return os.strerror(unreached.errno)
    return getattr(unreached, "strerror", None) or str(unreached) or f"no answer within {CONNECT_TIMEOUT_S} s"
