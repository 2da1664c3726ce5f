"""What is shown while the load runs."""

from __future__ import annotations

import io

from rich.console import Console

from mixtral_benchmark.measure import Chat, Failure
from mixtral_benchmark.progress import LINE_EVERY_S, Lines, LiveBar, shown


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
