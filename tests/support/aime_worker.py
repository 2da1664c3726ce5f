"""A third-party worker on AIME's wire, as docs/aime.md describes what AIME's library says and how it takes what it is told.

It asks for jobs by long poll, sends the whole text so far and then the result, each result by a connection of its own. It has the
library's weaknesses too: descriptions that are no objects end it; an answer to its progress that it cannot take keeps it from ever sending
progress again (`is_deaf`). Where the library would ask again at once and for ever, at any status but 200 and 503 and at a result that is
not answered 200, it raises AssertionError.

`python -m support.aime_worker --api_server URL --job_type J` is one as a process, its key in MIXTRAL_WORKER_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp

from support.scripted_worker import FULL_LENGTH, text_of

VERSION = "aime-api-worker-interface 0.9.12"
NAME = "box#0_1xNVIDIA_H100"
OFFLINE_PAUSE_S = 0.05  # the library's is a second


def prompt_of(data: Mapping[str, Any]) -> str:
    """As support.scripted_worker.prompt_of reads a job of ours: both kinds of worker answer a chat alike."""
    context = data.get("chat_context")
    if context:
        return "\n".join(f"{one['role']}: {one['content']}" for one in context)
    return str(data.get("prompt_input") or "")


def chat_outputs(data: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    prompt = prompt_of(data)
    return {"text": text_of(prompt, tokens), "num_generated_tokens": tokens, "current_context_length": len(prompt.split()) + tokens}


Outputs = Callable[[Mapping[str, Any], int], dict[str, Any]]


@dataclass
class AimeWorker:
    """`async with AimeWorker(url, key) as worker:`

    batch: most jobs at once; per_post: tokens between two posts; pause_after: tokens after which every job waits for worker.go; outputs:
    what it says of a job with so many tokens; fail: the error that every result is; is_keen: it asks for the free rest of its batch while
    jobs run.
    """

    url: str
    key: str
    job_type: str = "mixtral_chat"
    name: str = NAME
    batch: int = 4
    per_post: int = 3
    length: int = FULL_LENGTH
    pause_after: int | None = None
    outputs: Outputs = chat_outputs
    fail: str | None = None
    token_s: float = 0.0
    is_keen: bool = False
    go: asyncio.Event = field(default_factory=asyncio.Event)
    batches: list[list[dict[str, Any]]] = field(default_factory=list)
    commands: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)  # to results
    progress_answers: list[Any] = field(default_factory=list)
    canceled: set[str] = field(default_factory=set)
    is_deaf: bool = False
    """It sends no progress any more, for an answer that it could not take."""

    def __post_init__(self) -> None:
        self._running: dict[str, asyncio.Task[None]] = {}
        self._finished: set[str] = set()

    async def __aenter__(self) -> AimeWorker:
        self._http = aiohttp.ClientSession()
        self._task = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.vanish()
        if error is None and not self._task.cancelled():
            self._task.result()

    async def vanish(self) -> None:
        """Stop as a killed process does."""
        for task in (self._task, *self._running.values()):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._http.close()

    @property
    def seen(self) -> list[dict[str, Any]]:
        """Every job that it was handed."""
        return [job for batch in self.batches for job in batch]

    @property
    def identity(self) -> dict[str, Any]:
        return {"auth": self.name, "job_type": self.job_type, "auth_key": self.key}

    # ------------------------------------------------------------------------------------------ the loop

    async def work(self) -> None:
        await self.post("/worker_check_server_status", self.identity)
        while True:
            command = await self.ask()
            self.commands.append(command)
            if command["cmd"] == "error":
                return
            if command["cmd"] != "job":
                continue
            self.take(command)
            while self._running and not (self.is_keen and len(self._running) < self.batch):
                await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_COMPLETED)
                for job_id in [job_id for job_id, task in self._running.items() if task.done()]:
                    self._running.pop(job_id).result()

    async def ask(self) -> dict[str, Any]:
        body = self.identity | {
            "version": VERSION,
            "worker_version": 0,
            "gpu_name": "NVIDIA_H100",
            "num_gpus": 1,
            "request_timeout": 60,
            "model_label": "Mixtral 8x7B",
            "model_quantization": "fp16",
            "max_job_batch": self.batch - len(self._running),
            "framework": "pytorch",
            "framework_version": "2.7",
            "pytorch_version": "2.7",
        }
        answer: dict[str, Any] = await self.post("/worker_job_request", body)
        return answer

    def take(self, command: dict[str, Any]) -> None:
        for name in ("input_descriptions", "progress_output_descriptions", "final_output_descriptions"):
            assert all("type" in one for one in command[name].values()), name
        self.batches.append(command["job_data"])
        for job in command["job_data"]:
            self._running[job["job_id"]] = asyncio.create_task(self._serve(job))

    async def _serve(self, job: dict[str, Any]) -> None:
        whole = min(self.length, job.get("max_gen_tokens") or self.length)
        tokens = 0
        while tokens < whole and self.fail is None:
            if self.pause_after is not None and tokens >= self.pause_after:
                await self.go.wait()
            tokens = min(tokens + self.per_post, whole, *([self.pause_after] if self.pause_after and not self.go.is_set() else []))
            await asyncio.sleep(self.token_s * self.per_post)
            await self.progress((job["job_id"], tokens, self.outputs(job, tokens)))
        result = {"error": self.fail} if self.fail is not None else self.outputs(job, whole)
        self._finished.add(job["job_id"])
        await self.result(job["job_id"], **result)

    async def progress(self, *items: tuple[str, Any, dict[str, Any]]) -> None:
        """One post for (job, progress, outputs) of each. The library says who it is beside the outputs."""
        if self.is_deaf:
            return
        keyless = {name: value for name, value in self.identity.items() if name != "auth"}
        body = [
            {**keyless, "job_id": job_id, "progress": number, "progress_data": {**outputs, "auth": self.name, "version": VERSION}}
            for job_id, number, outputs in items
        ]
        try:
            answers = await self.post("/worker_job_progress", body)
            self.progress_answers.append(answers)
            for answer in answers:
                if answer.get("job_id") in self._finished:
                    raise KeyError(answer["job_id"])
                if answer.get("canceled"):
                    self.canceled.add(answer["job_id"])
        except (ValueError, KeyError, AttributeError, TypeError):
            self.is_deaf = True

    async def result(self, job_id: str, **outputs: Any) -> dict[str, Any]:
        body = {**self.identity, "job_id": job_id, "version": VERSION, "arrival_time": 1.5, "finished_time": 2.5, **outputs}
        async with aiohttp.request("POST", self.url + "/worker_job_result", json=body) as answer:
            assert answer.status == 200, await answer.text()
            self.answers.append(await answer.json())
            return self.answers[-1]

    async def post(self, path: str, body: Any) -> Any:
        while True:
            try:
                async with self._http.post(self.url + path, json=body) as answer:
                    if answer.status == 200 or path == "/worker_job_progress":
                        return await answer.json()
                    assert answer.status == 503, await answer.text()
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(OFFLINE_PAUSE_S)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--api_server", required=True)
    parser.add_argument("--job_type", required=True)
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=FULL_LENGTH)
    parser.add_argument("--token_ms", type=float, default=20)
    flags = parser.parse_args()
    worker = AimeWorker(
        flags.api_server,
        os.environ["MIXTRAL_WORKER_KEY"],
        flags.job_type,
        flags.name,
        batch=flags.batch,
        per_post=1,
        length=flags.length,
        token_s=flags.token_ms / 1000,
    )
    async with worker:
        print("event=asking", flush=True)
        await worker._task


if __name__ == "__main__":
    asyncio.run(main())
