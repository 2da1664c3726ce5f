"""A whole server in a thread of its own, on a real Redis and a real SQLite, for tests that speak to it over HTTP alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import aiohttp

from mixtral_server.accounts import Accounts
from mixtral_server.apikeys import NO_LIMITS, KeyLimits, Scope, prefix_of
from mixtral_server.app import Started, serve
from mixtral_server.database import Database
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.routes.service import Stages
from mixtral_server.settings import Settings

T = TypeVar("T")

START_LIMIT_S = 60.0
QUICK = {"port": 0, "client_grace_s": 0.0, "ready_delay_s": 0.0, "shutdown_grace_s": 0.2, "worker_poll_s": 5.0, "max_connections": 500}


class LiveServer:
    """`with LiveServer(data_dir, redis_url, **settings) as server:` then server.url and server.client_key, .worker_key, .admin_key."""

    def __init__(self, data_dir: Path, redis_url: str, *endpoints: EndpointConfig, **settings: object) -> None:
        self.settings = replace(Settings(), **{**QUICK, "data_dir": str(data_dir), "redis_url": redis_url, **settings})
        self._endpoints = {one.name: one for one in endpoints or (EndpointConfig(name="mixtral_chat"),)}
        self._started: Started | None = None
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live server")
        self.error: BaseException | None = None

    def __enter__(self) -> LiveServer:
        self._thread.start()
        if not self._is_up.wait(START_LIMIT_S):
            raise TimeoutError(f"the server did not start within {START_LIMIT_S:.0f} s")
        if self.error is not None:
            self._thread.join()
            raise self.error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        if self.error is not None:
            raise self.error

    @property
    def url(self) -> str:
        return self.started.url

    @property
    def started(self) -> Started:
        assert self._started is not None
        return self._started

    @property
    def client_key(self) -> str:
        return self._first_key("client")

    @property
    def worker_key(self) -> str:
        return self._first_key("worker")

    @property
    def admin_key(self) -> str:
        return self._first_key("admin")

    def http(self) -> aiohttp.ClientSession:
        """A client with the client key and the server's address."""
        return aiohttp.ClientSession(self.url, headers={"Authorization": f"Bearer {self.client_key}"})

    async def new_key(self, *scopes: Scope, user: str = "someone", endpoints: Sequence[str] = (), limits: KeyLimits = NO_LIMITS) -> str:
        """As `mixtral-server keys create` makes it."""
        return await self._with_accounts(
            lambda accounts: accounts.create_key(
                user=user, name=f"{user}'s", scopes=scopes, endpoints=endpoints, limits=limits, now_s=time.time()
            )
        )

    async def set_key(self, key: str, **limits: int | None) -> None:
        """As `mixtral-server keys set` does it."""
        await self._with_accounts(lambda accounts: accounts.set_key(prefix_of(key), limits))

    async def revoke_key(self, key: str) -> None:
        """As `mixtral-server keys revoke` does it."""
        await self._with_accounts(lambda accounts: accounts.revoke_key(prefix_of(key), time.time()))

    async def _with_accounts(self, act: Callable[[Accounts], Awaitable[T]]) -> T:
        database = Database(self.settings.sql_url)
        try:
            return await act(Accounts(database))
        finally:
            await database.close()

    def leave(self) -> None:
        """What SIGTERM does."""
        self._loop.call_soon_threadsafe(self._stages.leaving.set)

    def stop(self) -> None:
        """What asking twice does, and wait for the end."""
        if self._thread.is_alive():
            for stage in (self._stages.draining, self._stages.closing, self._stages.leaving):
                self._loop.call_soon_threadsafe(stage.set)
        self._thread.join(START_LIMIT_S)

    def _first_key(self, scope: str) -> str:
        assert self.started.first_keys is not None
        return next(key for name, key in self.started.first_keys.items() if name == scope)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            self.error = error
        finally:
            self._is_up.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stages = Stages()
        await serve(self.settings, self._endpoints, self._stages, self._on_started)

    def _on_started(self, started: Started) -> None:
        self._started = started
        self._is_up.set()
