"""SyncClient: MixtralClient for scripts that are not asynchronous. One event loop in a thread of its own; no second implementation.

Decides what Ctrl-C does: it cancels the job being read, waits for that, and goes on as KeyboardInterrupt. Leaves everything else to
client.py. May be shared by threads. A call from inside an event loop is refused with a sentence: it would stop that loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from mixtral_client.client import GOODBYE_S, Answer, JobOptions, JobStream, Messages, MixtralClient, Prompt
from mixtral_client.protocol import Finish, JobAccepted, JobEvent, JobView, ModelCard
from mixtral_client.resume import Retry, Timeouts

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread, for callers outside of it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mixtral-client", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The outcome of the coroutine. Whatever interrupts the wait (Ctrl-C) cancels the coroutine, and goes on once that has ended."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            coroutine.close()
            raise RuntimeError("this waits for its answer and would stop the event loop around it; use `await` with MixtralClient there")
        if not self.is_running:
            coroutine.close()
            raise RuntimeError("the client was closed; make a new one")
        has_ended = threading.Event()
        future = asyncio.run_coroutine_threadsafe(_marking(coroutine, has_ended), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                has_ended.wait(2 * GOODBYE_S)
            raise

    def close(self) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _marking(coroutine: Coroutine[Any, Any, T], has_ended: threading.Event) -> T:
    try:
        return await coroutine
    finally:
        has_ended.set()


class SyncClient:
    """A service, for scripts. Use as `with`."""

    def __init__(
        self, api_server: str | Sequence[str], api_key: str | None = None, *, retry: Retry | None = None, timeouts: Timeouts | None = None
    ) -> None:
        self._client = MixtralClient(api_server, api_key, retry=retry, timeouts=timeouts)
        self._thread = LoopThread()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """As MixtralClient.close. A second time does nothing."""
        if self._thread.is_running:
            self._thread.run(self._client.close())
            self._thread.close()

    def with_options(self, *, retry: Retry | None = None, timeouts: Timeouts | None = None) -> Self:
        """As MixtralClient.with_options."""
        other = type(self).__new__(type(self))
        other._thread = self._thread
        other._client = self._client.with_options(retry=retry, timeouts=timeouts)
        return other

    def chat(self, messages: Messages, **options: Unpack[JobOptions]) -> Answer:
        return self._thread.run(self._client.chat(messages, **options))

    def complete(self, prompt: Prompt, **options: Unpack[JobOptions]) -> Answer:
        return self._thread.run(self._client.complete(prompt, **options))

    def stream(
        self,
        messages: Messages | None = None,
        *,
        prompt: Prompt | None = None,
        detach: bool = False,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> SyncStream:
        stream = self._client.stream(messages, prompt=prompt, detach=detach, idempotency_key=idempotency_key, **options)
        return SyncStream(self._thread, stream)

    def events(self, job_id: str, after: str | int = "") -> SyncStream:
        return SyncStream(self._thread, self._client.events(job_id, after))

    def submit(
        self,
        messages: Messages | None = None,
        *,
        prompt: Prompt | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> JobAccepted:
        return self._thread.run(self._client.submit(messages, prompt=prompt, idempotency_key=idempotency_key, **options))

    def job(self, job_id: str) -> JobView:
        return self._thread.run(self._client.job(job_id))

    def cancel(self, job_id: str) -> JobView:
        return self._thread.run(self._client.cancel(job_id))

    def models(self) -> list[ModelCard]:
        return self._thread.run(self._client.models())


class SyncStream(Iterator[JobEvent]):
    """A JobStream whose events come from a plain `for`."""

    def __init__(self, thread: LoopThread, stream: JobStream) -> None:
        self._thread = thread
        self._stream = stream

    @property
    def job_id(self) -> str:
        return self._stream.job_id

    @property
    def last_id(self) -> str:
        return self._stream.last_id

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def finish(self) -> Finish | None:
        return self._stream.finish

    def answer(self) -> Answer:
        return self._thread.run(self._stream.answer())

    def cancel(self) -> None:
        self._thread.run(self._stream.cancel())

    def close(self) -> None:
        self._thread.run(self._stream.aclose())

    def __next__(self) -> JobEvent:
        event = self._thread.run(self._next())
        if event is None:
            raise StopIteration
        return event

    async def _next(self) -> JobEvent | None:
        return await anext(self._stream, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A Ctrl-C between two events cancels the job, as one during a wait does."""
        cancelled = asyncio.CancelledError if kind is not None and issubclass(kind, KeyboardInterrupt) else kind
        self._thread.run(self._stream.__aexit__(cancelled, error, trace))
