"""Tasks that are ended have ended."""

from __future__ import annotations

import asyncio

from mixtral_server.tasks import end


async def test_task_that_swallows_cancellations_is_asked_until_it_ends() -> None:
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)  # it has begun
    await end([task], ask_again_s=0.1)
    assert (task.cancelled(), swallowed) == (True, 3)


async def test_task_that_has_ended_or_fails_while_ending_is_no_trouble() -> None:
    async def failing() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("on the way out")

    done, broken = asyncio.create_task(asyncio.sleep(0)), asyncio.create_task(failing())
    await done
    await end([done, broken])
    assert isinstance(broken.exception(), ValueError)
