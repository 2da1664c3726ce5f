"""What an operator sees while the load runs, on stderr: a live bar on a terminal, now and then a line elsewhere.

Decides nothing about the measurement and keeps only counts. stdout belongs to report.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mixtral_benchmark.load import Watcher
from mixtral_benchmark.measure import Chat

LINE_EVERY_S = 5
REFRESH_PER_S = 2
"""The bar is drawn in this process, and drawing takes time from reading the sockets."""


class Counts:
    """How far the load is."""

    def __init__(self, total: int, now: Callable[[], float]) -> None:
        self.total, self._now = total, now
        self.running = self.completed = self.failed = self.tokens = 0
        self._began_s = now()

    @property
    def elapsed_s(self) -> float:
        return self._now() - self._began_s

    @property
    def ended(self) -> int:
        return self.completed + self.failed

    def __str__(self) -> str:
        rate = self.tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.ended}/{self.total} chats{failed}, {self.running} running, {self.tokens:,} tokens, {rate:,.1f} tokens/s"

    def sent(self, chat: Chat) -> None:
        self.running += 1

    def arrived(self, chat: Chat, tokens: int) -> None:
        self.tokens += tokens

    def ended_one(self, chat: Chat) -> None:
        self.running -= 1
        self.completed += chat.completed
        self.failed += not chat.completed


class Shown(Watcher, Protocol):
    """A watcher that has the screen while its context lasts."""

    def __enter__(self) -> Shown: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class LiveBar:
    def __init__(self, what: str, total: int, now: Callable[[], float], console: Console) -> None:
        self._counts = Counts(total, now)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, refresh_per_second=REFRESH_PER_S)
        self._task = self._bar.add_task(what, total=total, counts=str(self._counts))

    def sent(self, chat: Chat) -> None:
        self._counts.sent(chat)
        self._draw()

    def arrived(self, chat: Chat, tokens: int) -> None:
        self._counts.arrived(chat, tokens)
        self._draw()

    def ended(self, chat: Chat) -> None:
        self._counts.ended_one(chat)
        self._draw()

    def _draw(self) -> None:
        self._bar.update(self._task, completed=self._counts.ended, counts=self._counts)

    def __enter__(self) -> LiveBar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


class Lines:
    def __init__(self, what: str, total: int, now: Callable[[], float], console: Console) -> None:
        self._what, self._console = what, console
        self._counts = Counts(total, now)
        self._last_s = 0.0

    def sent(self, chat: Chat) -> None:
        self._counts.sent(chat)

    def arrived(self, chat: Chat, tokens: int) -> None:
        self._counts.arrived(chat, tokens)
        if self._counts.elapsed_s - self._last_s >= LINE_EVERY_S:
            self._say()

    def ended(self, chat: Chat) -> None:
        self._counts.ended_one(chat)
        if self._counts.ended == self._counts.total:
            self._say()

    def _say(self) -> None:
        self._last_s = self._counts.elapsed_s
        self._console.print(f"{self._what}: {self._counts}", highlight=False, soft_wrap=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return


def shown(what: str, total: int, now: Callable[[], float], console: Console) -> Shown:
    return LiveBar(what, total, now, console) if console.is_terminal else Lines(what, total, now, console)
