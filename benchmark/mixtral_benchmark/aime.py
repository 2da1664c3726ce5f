"""One chat over AIME's wire: submit, then ask for its progress every 300 ms, as AIME's own clients do.

Decides what counts as a token's arrival there: the poll that first shows it. So a time is as coarse as the polling, and tokens of one
poll share it; the report says how many did.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from mixtral_benchmark.measure import Chat, Failure
from mixtral_benchmark.prompts import Ask
from mixtral_benchmark.wires import CONNECT_TIMEOUT_S, ChatFailed, ServerFacts, Target, Wire, raise_for_status

POLL_S = 0.3


class AimeWire(Wire):
    """POST /<endpoint>, then GET /<endpoint>/progress until it is done."""

    name = "aime"

    async def have(self, ask: Ask, chat: Chat) -> None:
        ticket = await self._submit(ask)
        chat.job = ticket
        while True:
            await asyncio.sleep(POLL_S)
            answer = await self._progress(ticket)
            at_s = self._now()
            if answer.get("job_state") == "done":
                return self._done(chat, at_s, answer.get("job_result") or {})
            progress = answer.get("progress") or {}
            said = progress.get("progress_data") or {}
            self._count(chat, at_s, said.get("num_generated_tokens", progress.get("progress")))

    async def _submit(self, ask: Ask) -> str:
        # AIME's clients send every object as a JSON string.
        body = {"prompt_input": "", "chat_context": json.dumps(list(ask.messages)), "max_gen_tokens": ask.max_tokens}
        body |= {"wait_for_result": False, "key": self._target.key}
        if ask.temperature is not None:
            body["temperature"] = ask.temperature
        async with self._http.post(f"{self._target.url}/{self._target.endpoint}", json=body) as response:
            answer = await _read(response)
        if answer.get("success") is not True or not isinstance(answer.get("job_id"), str):
            raise ChatFailed(_refusal(response.status, answer))
        ticket: str = answer["job_id"]
        return ticket

    async def _progress(self, ticket: str) -> dict[str, Any]:
        query = {"job_id": ticket} | ({"key": self._target.key} if self._target.key else {})
        async with self._http.get(f"{self._target.url}/{self._target.endpoint}/progress", params=query) as response:
            answer = await _read(response)
        if answer.get("success") is not True:
            raise ChatFailed(_refusal(response.status, answer))
        return answer

    def _done(self, chat: Chat, at_s: float, result: Mapping[str, Any]) -> None:
        if result.get("error"):
            raise ChatFailed(Failure("job_failed", str(result["error"])[:300]))
        self._count(chat, at_s, result.get("num_generated_tokens"))
        chat.ended_s, chat.finish = at_s, "stop"
        chat.usage_tokens = result.get("num_generated_tokens")
        context = result.get("current_context_length")
        if isinstance(context, int) and isinstance(chat.usage_tokens, int):
            chat.prompt_tokens = max(0, context - chat.usage_tokens)
        if chat.texts is not None:
            chat.texts.append(str(result.get("text") or ""))

    def _count(self, chat: Chat, at_s: float, tokens: object) -> None:
        known = sum(arrival.tokens for arrival in chat.arrivals)
        if isinstance(tokens, int) and tokens > known:
            self._saw(chat, at_s, tokens - known)


async def ask_aime_server(http: aiohttp.ClientSession, target: Target) -> ServerFacts:
    """Raises MixtralError, aiohttp.ClientError, TimeoutError or ValueError."""
    query = {"key": target.key} if target.key else {}
    async with asyncio.timeout(CONNECT_TIMEOUT_S), http.get(f"{target.url}/api/endpoints", params=query) as response:
        await raise_for_status(response)
        names = (await _read(response)).get("endpoints")
        if not isinstance(names, list):
            raise ValueError("a list of endpoints was due")
        return ServerFacts(tuple(map(str, names)), response.headers.get("Server"), None)


async def _read(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """AIME answers with an object whatever the status. Raises MixtralError or ValueError for anything else."""
    try:
        answer = json.loads(await response.read())
    except ValueError:
        await raise_for_status(response)
        raise
    if not isinstance(answer, dict):
        raise ValueError(f"an object was due; got {str(answer)[:80]}")
    return answer


def _refusal(status: int, answer: Mapping[str, Any]) -> Failure:
    error = answer.get("error") or answer.get("description") or answer
    sentence = "; ".join(map(str, error)) if isinstance(error, list) else str(error)
    return Failure("job_lapsed" if answer.get("job_state") == "lapsed" else f"http_{status}", sentence[:300])
