"""Ending tasks for sure.

Under Python 3.11, asyncio.wait_for swallows a cancellation that comes in the moment its inner call ends, and libraries wait through it. So
one cancel() of a task may be lost: it is asked again until it has ended. Not at once, though: a second
cancel() that meets a task in its clean-up would break that off, and leave a database connection's thread behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

ASK_AGAIN_S = 1.0


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel them and wait until the last has ended, however it ended."""
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=ASK_AGAIN_S)
