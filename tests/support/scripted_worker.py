"""A worker without a model: it speaks the worker wire over HTTP and answers every job with tokens that follow from its prompt.

A test decides where it pauses, how it fails and when it dies; everything else is as a real worker does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from dataclasses import dataclass, field
from types import TracebackType

import aiohttp

from mixtral_client.protocol import (
    PROTOCOL_VERSION,
    Frame,
    FrameError,
    JobSpec,
    SessionAnswer,
    SessionRequest,
    TokenChance,
    TokenLogprobs,
    TurnAnswer,
    TurnRequest,
    WorkerJob,
)

FULL_LENGTH = 10


def prompt_of(spec: JobSpec) -> str:
    if spec.messages is not None:
        return "\n".join(f"{one.role}: {one.content}" for one in spec.messages)
    return spec.prompt if isinstance(spec.prompt, str) else " ".join(map(str, spec.prompt or []))


def token(prompt: str, offset: int) -> tuple[int, str]:
    """(id, text) of the token at that offset of the answer to that prompt."""
    number = zlib.crc32(f"{prompt}|{offset}".encode()) % 32_000
    return number, f"w{number} "


def text_of(prompt: str, tokens: int = FULL_LENGTH) -> str:
    return "".join(token(prompt, offset)[1] for offset in range(1, tokens + 1))


def answer_to(content: str, tokens: int = FULL_LENGTH) -> str:
    """The whole answer to a chat of one user message."""
    return text_of(f"user: {content}", tokens)


def logprobs_of(prompt: str, offset: int, top: int) -> TokenLogprobs:
    """Of the token at that offset: itself, then its neighbours' ids, a half of é among them."""
    number, text = token(prompt, offset)
    chances = [TokenChance(id=number, text=text, bytes=text.encode().hex(), logprob=-0.25)]
    chances += [TokenChance(id=number + 1, text="\ufffd", bytes="c3", logprob=-2.0), TokenChance(id=2, text="</s>", bytes="", logprob=-9.5)]
    return TokenLogprobs(**chances[0].model_dump(), top=chances[:top])


@dataclass
class _Running:
    job: WorkerJob
    produced: int


@dataclass
class ScriptedWorker:
    """`async with ScriptedWorker(url, key) as worker:`

    pause_after: tokens after which every job waits for worker.go; fail: how every job ends instead of with tokens; per_turn: tokens a turn;
    length: tokens of a whole answer.
    """

    url: str
    key: str
    endpoint: str = "mixtral_chat"
    slots: int = 4
    per_turn: int = 3
    length: int = FULL_LENGTH
    max_seq_len: int = 4096
    model: str = "none"
    pause_after: int | None = None
    fail: FrameError | None = None
    go: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[WorkerJob] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    session: str = ""

    def __post_init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._turn = 0

    async def __aenter__(self) -> ScriptedWorker:
        self._http = aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.key}"})
        body = SessionRequest(
            endpoint=self.endpoint,
            name="scripted",
            protocol=PROTOCOL_VERSION,
            version="0",
            model=self.model,
            device="cpu",
            max_slots=self.slots,
            max_seq_len=self.max_seq_len,
        )
        self.session = SessionAnswer.model_validate(await self._post("/v1/worker/sessions", body.model_dump())).session
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.vanish()
        headers = {"Authorization": f"Bearer {self.key}"}
        try:
            async with aiohttp.request("DELETE", f"{self.url}/v1/worker/sessions/{self.session}", headers=headers) as answer:
                assert answer.status in (200, 503), await answer.text()
        except aiohttp.ClientConnectionError:
            pass  # the server ended first: its sessions lapse

    async def vanish(self) -> None:
        """Stop as a killed process does: no word to the server."""
        if not self._task.done():
            self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._http.close()

    async def _work(self) -> None:
        while True:
            self._turn += 1
            frames = self._frames()
            body = TurnRequest(
                session=self.session,
                turn=self._turn,
                holding=[(one.job.id, one.job.attempt) for one in self._running.values()],
                frames=frames,
                room=self.slots - len(self._running),
            )
            answer = TurnAnswer.model_validate(await self._post("/v1/worker/turn", body.model_dump()))
            for frame in frames:
                if frame.finish or frame.error:
                    self._running.pop(frame.job, None)
            for drop in answer.drops:
                self.dropped.append(drop.job)
                self._running.pop(drop.job, None)
            for job in answer.jobs:
                self.seen.append(job)
                self._running[job.id] = _Running(job, len(job.produced_ids))
            if self._running and not frames:
                await asyncio.sleep(0.005)  # a paused job: report now and then, as a worker in a long prefill does

    def _frames(self) -> list[Frame]:
        return [frame for one in self._running.values() if (frame := self._frame(one)) is not None]

    def _frame(self, one: _Running) -> Frame | None:
        job = one.job
        if self.fail is not None:
            return Frame(job=job.id, attempt=job.attempt, offset=one.produced + 1, error=self.fail)
        whole = min(job.spec.max_tokens, self.length)
        upto = min(one.produced + self.per_turn, whole)
        if self.pause_after is not None and not self.go.is_set():
            upto = min(upto, self.pause_after)
        offsets = range(one.produced + 1, upto + 1)
        if not offsets and upto < whole:
            return None
        tokens = [token(prompt_of(job.spec), offset) for offset in offsets]
        first, one.produced = one.produced + 1, upto
        finish = None if upto < whole else "length" if job.spec.max_tokens <= self.length else "stop"
        top = job.spec.top_logprobs
        logprobs = [logprobs_of(prompt_of(job.spec), offset, top).model_dump_json() for offset in offsets] if top is not None else None
        return Frame(
            job=job.id,
            attempt=job.attempt,
            offset=first,
            logprobs=logprobs,
            dropped_messages=4 if job.spec.truncate else None,
            ids=[number for number, _ in tokens],
            texts=[self.text(text) for _, text in tokens],
            finish=finish,
            prompt_tokens=len(prompt_of(job.spec).split()),
        )

    def text(self, word: str) -> str:
        """What is sent for a word; a test may have it otherwise."""
        return word

    async def _post(self, path: str, body: dict[str, object]) -> object:
        """Sent again, the same, while the server or its Redis is away: every call may be repeated."""
        while True:
            try:
                async with self._http.post(self.url + path, json=body) as answer:
                    if answer.status in (200, 201):
                        return await answer.json()
                    if answer.status != 503:
                        raise AssertionError(f"{path}: {answer.status} {await answer.text()}")
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.02)
