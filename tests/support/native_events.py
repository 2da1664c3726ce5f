"""What a reader of a native job was told, as it came."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp

from mixtral_client.sse import SseDecoder
from support.http import PATIENCE_S


class Events:
    """`async with Events(http, job_id) as events:` – what a native reader was told, as it came."""

    def __init__(self, http: aiohttp.ClientSession, job_id: str, last_event_id: str = "") -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []
        self.last_id = last_event_id
        self._headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self._http, self._job_id = http, job_id

    async def __aenter__(self) -> Events:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        decoder = SseDecoder()
        async with self._http.get(f"/v1/jobs/{self._job_id}/events", headers=self._headers) as answer:
            async for part in answer.content.iter_any():
                for one in decoder.feed(part):
                    if one.event in ("token", "rewind"):
                        self.last_id = one.id
                    if one.event != "queued":
                        self.all.append((one.event, json.loads(one.data)))

    async def over(self) -> list[str]:
        """Names of all events, once the last has come."""
        async with asyncio.timeout(PATIENCE_S):
            await self._task
        return [name for name, _ in self.all]

    @property
    def text(self) -> str:
        """Of the tokens that stand, their offsets checked."""
        texts: list[str] = []
        for name, fields in self.all:
            if name == "token":
                assert fields["offset"] == len(texts) + 1
                texts.append(fields["text"])
            elif name == "rewind":
                del texts[fields["to"] :]
        return "".join(texts)

    @property
    def offset(self) -> int:
        return next((fields.get("offset", fields.get("to", 0)) for name, fields in reversed(self.all) if name in ("token", "rewind")), 0)
