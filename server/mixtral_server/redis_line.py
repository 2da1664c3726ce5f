"""Line: one connection to Redis on which many calls are under way at once.

Redis runs scripts one after another, so a connection for each call would gain nothing. Here the commands of one round of the event
loop leave in one write, and answers are told to their calls in turn, without a task that waits for them.

Decides how calls share a connection and what becomes of them when it breaks. Leaves connecting and logging in to redis-py's connection,
deadlines and which node that is to redis_client.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import hiredis
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, DefaultParser
from redis.asyncio.retry import Retry

LONG_BYTES = 2048
"""A longer command is sent at once: it is a turn of many frames, for which readers wait, and the loop's next round is some way off."""

Answer: TypeAlias = "asyncio.Future[Any]"


class _Wire(asyncio.Protocol):
    """One connection, from its login to its end."""

    def __init__(self, writer: asyncio.StreamWriter, is_elsewhere: Callable[[Exception], bool]) -> None:
        self.is_good = True
        """New calls may use it."""
        self._writer = writer  # kept: where it ends, it closes its transport
        self._transport = writer.transport
        self._is_elsewhere = is_elsewhere
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(
            protocolError=redis_errors.InvalidResponse, replyError=DefaultParser.parse_error, encoding="utf-8", notEnoughData=Ellipsis
        )
        self._unsent: list[bytes] = []
        self._awaited: deque[Answer] = deque()
        self._transport.set_protocol(self)

    def ask(self, command: bytes) -> Answer:
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.append(command)
        if len(command) >= LONG_BYTES:
            self._send()
        answer = self._loop.create_future()
        self._awaited.append(answer)
        return answer

    def _send(self) -> None:
        if self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while True:
            try:
                reply = self._reader.gets()
            except UnicodeDecodeError as error:  # of this one reply: the next begins where it should
                reply = error
            except redis_errors.InvalidResponse:
                self.hang_up()
                return
            if reply is Ellipsis:
                return
            answer = self._awaited.popleft()
            if isinstance(reply, Exception):
                if self._is_elsewhere(reply):
                    self.is_good = False  # calls under way are answered here
                if not answer.done():
                    answer.set_exception(reply)
            elif not answer.done():  # else its call has given up
                answer.set_result(reply)
            if not self.is_good and not self._awaited:
                self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_good = False
        for answer in self._awaited:
            if not answer.done():
                answer.set_exception(redis_errors.ConnectionError(f"the connection broke: {error or 'closed by Redis'}"))
        self._awaited.clear()

    def hang_up(self) -> None:
        self.is_good = False
        self._transport.abort()


class Line:
    """Made without I/O; it connects when it is asked, and anew after a connection is gone."""

    def __init__(self, make: Callable[[], AbstractConnection], retry: Retry, is_elsewhere: Callable[[Exception], bool]) -> None:
        """make: a connection that is not yet open; is_elsewhere: an error that says that another node is the one to ask."""
        self._make = make
        self._retry = retry
        self._is_elsewhere = is_elsewhere
        self._wire: _Wire | None = None
        self._connecting = asyncio.Lock()

    def asked(self, *words: Any) -> Answer | None:
        """Redis's answer, to come, where the connection stands; a ConnectionError then says that it broke."""
        return self._wire.ask(hiredis.pack_command(words)) if self._wire is not None and self._wire.is_good else None

    async def ask(self, *words: Any) -> Any:
        """Redis's answer. Sent again when the connection breaks: only what may run twice belongs here. Raises redis.RedisError."""
        command = hiredis.pack_command(words)
        return await self._retry.call_with_retry(lambda: self._ask_once(command), _no_matter)

    async def _ask_once(self, command: bytes) -> Any:
        async with self._connecting:
            wire = self._wire
            if wire is None or not wire.is_good:
                wire = self._wire = await self._connected()
        return await wire.ask(command)

    async def _connected(self) -> _Wire:
        connection = self._make()
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:  # its call has given up, too
            await connection.disconnect(nowait=True)
            raise
        writer = connection._writer
        assert writer is not None  # it is connected
        connection._reader = connection._writer = None  # ours from now on
        return _Wire(writer, self._is_elsewhere)

    def hang_up(self) -> None:
        """Break the connection: its calls are asked again on a new one."""
        if self._wire is not None:
            self._wire.hang_up()


async def _no_matter(error: Exception) -> None:
    """A connection that failed is gone already."""
