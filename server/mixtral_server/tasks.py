"""Ending tasks for sure.

Under Python 3.11, asyncio.wait_for swallows a cancellation that comes in the moment its inner call ends, and libraries wait through it. So
one cancel() of a task may be lost: it is asked again until it has ended. Not soon, though: a second cancel() that meets a task in its
clean-up would break that off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

ASK_AGAIN_S = 6.0
"""Longer than any clean-up: a connection to SQLite is closed once its last statement has waited 5 s for the lock."""


async def end(tasks: Collection[asyncio.Task[Any]], *, ask_again_s: float = ASK_AGAIN_S) -> None:
    """Cancel them and wait until the last has ended, however it ended."""
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=ask_again_s)
