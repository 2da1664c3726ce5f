"""What is shown while the load runs."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable

import pytest
from rich.console import Console

from mixtral_benchmark.measure import Chat, Failure
from mixtral_benchmark.progress import LINE_EVERY_S, SILENCE_S, Lines, LiveBar, Shown, note_silence, shown


class Clock:
    def __init__(self) -> None:
        self.time_s = 100.0

    def now(self) -> float:
        return self.time_s


def chat(failure: Failure | None = None) -> Chat:
    return Chat(0, 0.0, 0.0, ended_s=1.0, failure=failure)


def test_lines_are_said_now_and_then_and_at_the_end() -> None:
    text, clock = io.StringIO(), Clock()
    with shown("chats", 2, clock.now, Console(file=text, force_terminal=False)) as watcher:
        assert isinstance(watcher, Lines)
        watcher.sent(chat())
        watcher.sent(chat())
        watcher.arrived(chat(), 5)
        assert text.getvalue() == ""
        clock.time_s += LINE_EVERY_S
        watcher.arrived(chat(), 5)
        watcher.arrived(chat(), 5)
        watcher.ended(chat())
        watcher.ended(chat(Failure("timeout", "too late")))
    assert text.getvalue().splitlines() == [
        "chats: 0/2 chats, 2 running, 10 tokens, 2.0 tokens/s",
        "chats: 2/2 chats, 1 failed, 0 running, 15 tokens, 3.0 tokens/s",
    ]


def test_terminal_gets_a_bar_that_ends_with_the_last_counts() -> None:
    text, clock = io.StringIO(), Clock()
    with shown("chats", 1, clock.now, Console(file=text, force_terminal=True, width=120)) as watcher:
        assert isinstance(watcher, LiveBar)
        watcher.sent(chat())
        watcher.arrived(chat(), 8)
        clock.time_s += 4
        watcher.ended(chat())
    assert "1/1 chats, 0 running, 8 tokens, 2.0 tokens/s" in text.getvalue()


class Nap(Clock):
    """Sleeps take no time; during each, one of the given things happens. After the last, the sleeper is cancelled."""

    def __init__(self, *happenings: Callable[[], None]) -> None:
        super().__init__()
        self._happenings = list(happenings)

    async def sleep_until(self, at_s: float) -> None:
        if not self._happenings:
            raise asyncio.CancelledError
        self.time_s = at_s
        self._happenings.pop(0)()


def nothing() -> None:
    return


async def test_silence_is_said_while_chats_run_and_only_then() -> None:
    text = io.StringIO()
    watcher = Shown("chats", 1, lambda: 0.0, Console(file=text, force_terminal=False))
    nap = Nap(
        nothing,  # no chat runs yet
        lambda: watcher.sent(chat()),
        nothing,
        lambda: watcher.arrived(chat(), 1),
        nothing,
        lambda: watcher.ended(chat()),
        nothing,  # none runs any more
    )
    with pytest.raises(asyncio.CancelledError):
        await note_silence(watcher, nap)
    line = f"chats: no token for {SILENCE_S} s, 1 chats wait; is a worker running? Ctrl-C ends the run"
    assert text.getvalue().splitlines() == [line] * 3
