"""One client of one Redis, whose every call ends soon, whatever has become of the other side.

Decides how long a call may take, when a Redis counts as away and how it is noticed again, what becomes of connections when the node to
ask is another one, and what Redis's errors mean. Leaves which node that is to redis_nodes.py, and all that is in it to queue.py.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import hiredis
from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Connection, Redis, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from mixtral_server.errors import RedisUnavailable
from mixtral_server.redis_line import Line
from mixtral_server.redis_url import Login, TlsFiles
from mixtral_server.tasks import end

LOG = logging.getLogger(__name__)

Address: TypeAlias = tuple[str, int]
Find: TypeAlias = Callable[[Address | None], Awaitable[Address]]

CALL_S = 3.0
"""For a whole call: waiting for a connection, finding the node, all tries. Above the 2 s that Redis itself waits for a slow fsync."""
TICK_S = 0.1
"""A call's time is counted in ticks of our own event loop, so that a process that stood still finds its answers and no lapsed deadlines."""
CONNECT_S = 2.0
PROBE_PAUSE_S = 0.2
MAX_CONNECTIONS = 64
MAX_MOVES = 3
"""A call follows a slot so often."""

_AWAY = (
    "OOM",
    "MISCONF",
    "READONLY",
    "NOREPLICAS",
    "LOADING",
    "BUSY",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "UNBLOCKED",
    "ASK",
    "MOVED",
)
"""Words in Redis's answers that mean: not now. All others are mistakes of ours."""
_ELSEWHERE = ("READONLY", "MASTERDOWN", "CLUSTERDOWN")
"""Those that a node says which is master no more, or cut off from the others."""
_WORD_OF: dict[type[Exception], str] = {
    redis_errors.OutOfMemoryError: "OOM",
    redis_errors.ReadOnlyError: "READONLY",
    redis_errors.MasterDownError: "MASTERDOWN",
    redis_errors.ClusterDownError: "CLUSTERDOWN",
    redis_errors.TryAgainError: "TRYAGAIN",
    redis_errors.AskError: "ASK",
    redis_errors.MovedError: "MOVED",
}


@contextmanager
def redis_answers() -> Iterator[None]:
    """Redis's errors that mean `not now` become RedisUnavailable; mistakes of ours stay what they are."""
    try:
        yield
    except (redis_errors.ConnectionError, redis_errors.TimeoutError) as error:
        raise RedisUnavailable(f"the queue's Redis does not answer ({type(error).__name__}); try again", retry_after_s=1.0) from error
    except redis_errors.ResponseError as error:
        word = _why_not_now(error)
        if word is None:
            raise
        raise RedisUnavailable(f"the queue's Redis takes no writes now ({word}); try again", retry_after_s=5.0) from error


def _is_elsewhere(error: Exception) -> bool:
    """The node that says so is not the one to ask."""
    return isinstance(error, redis_errors.ResponseError) and _why_not_now(error) in ("MOVED", *_ELSEWHERE)


def _why_not_now(error: redis_errors.ResponseError) -> str | None:
    """The client takes away the word that it made a class of; Redis 6.2 puts words of a script's inside into a longer sentence."""
    said = f"{_WORD_OF.get(type(error), '')} {error}"
    return next((word for word in _AWAY if word in said), None)


# ---------------------------------------------------------------------------------------------- deadlines


class _Pulse:
    """The deadline of every call to one Redis, and whether that Redis is known to be away.

    It is away when a call's time is over and nothing at all was heard since that call began: a single slow call says nothing of others.
    """

    def __init__(self, lost: Callable[[], None]) -> None:
        """lost: called when it is found to be away."""
        self.is_away = False
        self._lost = lost
        self.ticks = 0
        self._heard = 0
        self._open: dict[asyncio.Timeout | asyncio.Future[Any], int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, call: asyncio.Timeout | asyncio.Future[Any], began: int) -> None:
        """Until done(). Its time over, a timeout ends what stands in it, and an answer awaited is a redis.TimeoutError. began: in ticks."""
        self._open[call] = began
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def done(self, call: asyncio.Timeout | asyncio.Future[Any], is_heard: bool) -> None:
        self._open.pop(call, None)
        if is_heard:
            self._heard = self.ticks

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self.ticks += 1
        for call, began in list(self._open.items()):
            if (self.ticks - began) * TICK_S <= CALL_S:
                continue
            del self._open[call]
            if isinstance(call, asyncio.Timeout):
                call.reschedule(loop.time())
            elif not call.done():
                call.set_exception(_too_late())
            if self._heard <= began and not self.is_away:
                self.is_away = True
                self._lost()
        self._timer = loop.call_later(TICK_S, self._tick) if self._open else None


def _too_late() -> redis_errors.TimeoutError:
    return redis_errors.TimeoutError(f"no answer within {CALL_S:g} s")


# ---------------------------------------------------------------------------------------------- connections


class Home:
    """The address of the node to ask, kept until it is lost or a node says another."""

    def __init__(self, find: Find) -> None:
        """find: given the address that was lost (or None), asks where to go. Raises redis.ConnectionError."""
        self._find = find
        self._at: Address | None = None
        self._was: Address | None = None
        self._asking = asyncio.Lock()
        self.hang_up: Callable[[], Awaitable[None]]
        """Breaks every connection: called when the address is another than before."""

    async def address(self) -> Address:
        async with self._asking:
            if self._at is None:
                self._at = await self._find(self._was)
                if self._was not in (None, self._at):
                    LOG.warning("redis_moved from=%s:%s to=%s:%s", *(self._was or ()), *self._at)
                    await self.hang_up()
            return self._at

    def lost(self, address: Address | None = None) -> None:
        """Ask anew before the next connecting; only if it still is the address named."""
        if self._at is not None and address in (None, self._at):
            self._at, self._was = None, self._at

    def moved(self, address: Address) -> bool:
        """A node sends us elsewhere. Whether that is news."""
        is_news = address != self._at
        self._at = address
        return is_news


class _Bounded:
    """A connection whose making takes CONNECT_S at most, whatever of it hangs; commands have their call's own deadline."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """In C: redis-py's own, in Python, takes a fifth of the server's time for a turn of 64 frames."""
        return [hiredis.pack_command((*args[0].split(), *args[1:]))]

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                await super().connect_check_health(check_health, retry_socket_connect)  # type: ignore[misc]
        except TimeoutError as error:
            raise redis_errors.TimeoutError(f"no connection within {CONNECT_S:g} s") from error


class UnixConnection(_Bounded, UnixDomainSocketConnection):
    pass


class TcpConnection(_Bounded, Connection):
    """tls: None for a plain connection; home: asked for the address before each connecting."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, home: Home | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._tls = tls
        self._home = home

    async def _connect(self) -> None:
        if self._home:
            self.host, self.port = await self._home.address()
        try:
            await super()._connect()  # type: ignore[no-untyped-call]
        except BaseException:  # a connecting that is cut off, too: its host may be gone
            if self._home:
                self._home.lost((self.host, self.port))
            raise

    async def disconnect(self, nowait: bool = False, *more: Any, **named: Any) -> None:
        writer = self._writer
        await super().disconnect(nowait, *more, **named)
        if nowait and writer is not None:
            writer.transport.abort()  # a TLS goodbye would wait for the other side, perhaps longer than we live
            await asyncio.sleep(0)  # it is gone with the loop's next round

    def _connection_arguments(self) -> dict[str, Any]:
        return {"host": self.host, "port": self.port} | ({"ssl": self._tls} if self._tls else {})


def tls_context(files: TlsFiles | None) -> ssl.SSLContext | None:
    """Raises ValueError for files that cannot be used."""
    if files is None:
        return None
    try:
        context = ssl.create_default_context(cafile=files.ca_file or None)
        context.check_hostname = files.check_hostname
        context.verify_mode = ssl.CERT_REQUIRED if files.verify else ssl.CERT_NONE
        if files.cert_file:
            context.load_cert_chain(files.cert_file, files.key_file)
    except OSError as error:  # ssl.SSLError is one
        names = ", ".join(filter(None, (files.ca_file, files.cert_file, files.key_file)))
        raise ValueError(f"the TLS files of --redis_url cannot be used: {error.strerror or error}; look at {names}") from error
    return context


def connection_options(login: Login, tls: ssl.SSLContext | None = None) -> dict[str, Any]:
    """Of every connection. No timeouts: a call's deadline is one for all that it does."""
    options: dict[str, Any] = {
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "protocol": 2,
        "driver_info": None,
        "decode_responses": True,
    }
    options |= {"username": login.user or None, "password": login.password or None}
    return options | ({"tls": tls} if tls else {})


# ---------------------------------------------------------------------------------------------- one Redis


class RedisClient(Redis):
    """redis-py's client of one Redis, or of whichever node has one slot now, with one deadline for each call."""

    def __init__(self, connection_class: type[TcpConnection | UnixConnection], *, home: Home | None = None, **options: Any) -> None:
        retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 2)
        pool = BlockingConnectionPool(
            max_connections=MAX_CONNECTIONS,
            timeout=None,
            connection_class=connection_class,
            retry=retry,
            **options | ({"home": home} if home else {}),
        )
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self._line = Line(pool.make_connection, retry, _is_elsewhere)
        self._pulse = _Pulse(self._lost)
        self._probe: asyncio.Task[None] | None = None
        self._home = home
        if home:
            home.hang_up = self._hang_up

    def at(self, key: str) -> RedisClient:
        return self

    @property
    def is_away(self) -> bool:
        return self._pulse.is_away

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Raises redis.TimeoutError after CALL_S, and redis.ConnectionError at once while this Redis is known to be away."""
        if self._pulse.is_away:
            raise redis_errors.ConnectionError("it has not answered, and is asked until it does")
        return await self._in_time(self._pulse.ticks, *args, **options)

    async def run_script(self, *words: Any) -> Any:
        """execute_command() for EVALSHA, which nearly always finds its connection standing and its node where it was."""
        answer = None if self._pulse.is_away else self._line.asked(*words)
        if answer is None:
            return await self.execute_command(*words)
        began, is_heard = self._pulse.ticks, False
        self._pulse.watch(answer, began)
        try:
            reply = await answer
            is_heard = True
            return reply
        except redis_errors.ConnectionError:
            pass
        except redis_errors.ResponseError as error:
            is_heard = True
            if not _is_elsewhere(error):
                raise
        finally:
            self._pulse.done(answer, is_heard)
        return await self._in_time(began, *words)

    async def _in_time(self, began: int, *args: Any, **options: Any) -> Any:
        timeout, is_heard = asyncio.timeout(None), False
        self._pulse.watch(timeout, began)
        try:
            async with timeout:
                answer = await self._follow(*args, **options)
            is_heard = True
            return answer
        except TimeoutError as error:
            raise _too_late() from error
        except redis_errors.ResponseError:
            is_heard = True
            raise
        finally:
            self._pulse.done(timeout, is_heard)

    async def _follow(self, *args: Any, **options: Any) -> Any:
        """The answer of the node that has the slot now. Scripts share a line; all else, which is rare, has a connection to itself."""
        moves = 0
        while True:
            try:
                if args[0] == "EVALSHA":
                    return await self._line.ask(*args)
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
            except redis_errors.MovedError as error:
                moves += 1
                if self._home is None or moves > MAX_MOVES:
                    raise
                is_news = self._home.moved((error.host, int(error.port)))
                await self._hang_up(in_use=is_news)
            except redis_errors.ResponseError as error:
                if self._home and _why_not_now(error) in _ELSEWHERE:
                    self._home.lost()
                    await self._hang_up(in_use=False)
                raise

    async def _hang_up(self, in_use: bool = True) -> None:
        """Break connections: they lead to a node that is no longer the one to ask. Their calls try again elsewhere."""
        if in_use:
            self._line.hang_up()
        pool = self.connection_pool
        for connection in [*pool._available_connections, *(pool._in_use_connections if in_use else ())]:
            await connection.disconnect(nowait=True)  # the pool's own disconnect() waits for hosts that are gone

    def _lost(self) -> None:
        self._probe = asyncio.create_task(self._ask_until_it_answers(), name="redis probe")

    async def _ask_until_it_answers(self) -> None:
        LOG.error("redis_away: no answer for %g s; calls are refused until it answers", CALL_S)
        if self._home:
            self._home.lost()
        self._line.hang_up()
        await self._hang_up(in_use=False)
        while self._pulse.is_away:
            connection = self.connection_pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                async with asyncio.timeout(CALL_S):
                    await connection.send_command("PING")
                    await connection.read_response()
                self._pulse.is_away = False
            except redis_errors.ResponseError:
                self._pulse.is_away = False  # whatever it says, it speaks
            except (redis_errors.RedisError, OSError, TimeoutError):
                await asyncio.sleep(PROBE_PAUSE_S)
            finally:
                await connection.disconnect(nowait=True)
        LOG.warning("redis_back")

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        if self._probe:
            await end([self._probe])
        self._line.hang_up()
        await super().aclose(close_connection_pool)
