"""What an operator sees while the load runs, on stderr: a live bar on a terminal, now and then a line elsewhere.

Decides nothing about the measurement and keeps only counts. Leaves stdout to report.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mixtral_benchmark.load import Clock
from mixtral_benchmark.measure import Chat

LINE_EVERY_S = 5
REFRESH_PER_S = 2
"""The bar is drawn in this process, and drawing takes time from reading the sockets."""
SILENCE_S = 15
"""So long without a token is worth a word: most often no worker is there."""


class Shown:
    """A watcher of the load that counts, and has the screen while its context lasts. This one shows nothing."""

    def __init__(self, what: str, total: int, now: Callable[[], float], console: Console) -> None:
        self.what, self._total, self._now, self._console = what, total, now, console
        self.running = self._completed = self._failed = self.tokens = 0
        self._began_s = now()

    @property
    def elapsed_s(self) -> float:
        return self._now() - self._began_s

    @property
    def over(self) -> int:
        return self._completed + self._failed

    def __str__(self) -> str:
        rate = self.tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self.over}/{self._total} chats{failed}, {self.running} running, {self.tokens:,} tokens, {rate:,.1f} tokens/s"

    def sent(self, chat: Chat) -> None:
        self.running += 1
        self._show()

    def arrived(self, chat: Chat, tokens: int) -> None:
        self.tokens += tokens
        self._show()

    def ended(self, chat: Chat) -> None:
        self.running -= 1
        self._completed += chat.completed
        self._failed += not chat.completed
        self._show()

    def say(self, line: str) -> None:
        self._console.print(f"{self.what}: {line}", highlight=False, markup=False, soft_wrap=True)

    def _show(self) -> None:
        return

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return


class Lines(Shown):
    _last_s = 0.0

    def _show(self) -> None:
        is_due = self.tokens > 0 and self.elapsed_s - self._last_s >= LINE_EVERY_S
        if is_due or self.over == self._total:
            self._last_s = self.elapsed_s
            self.say(str(self))


class LiveBar(Shown):
    def __init__(self, what: str, total: int, now: Callable[[], float], console: Console) -> None:
        super().__init__(what, total, now, console)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, refresh_per_second=REFRESH_PER_S)
        self._task = self._bar.add_task(what, total=total, shown=self)

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.over)

    def __enter__(self) -> LiveBar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


def shown(what: str, total: int, now: Callable[[], float], console: Console) -> Shown:
    return (LiveBar if console.is_terminal else Lines)(what, total, now, console)


async def note_silence(watched: Shown, clock: Clock) -> None:
    """Say it whenever chats run and no token came for SILENCE_S. Runs until it is cancelled."""
    while True:
        tokens_before = watched.tokens
        await clock.sleep_until(clock.now() + SILENCE_S)
        if watched.running and watched.tokens == tokens_before:
            watched.say(f"no token for {SILENCE_S} s, {watched.running} chats wait; is a worker running? Ctrl-C ends the run")
