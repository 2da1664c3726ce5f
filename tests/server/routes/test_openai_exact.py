"""OpenAI's wire with a worker whose every token is known: texts, finish reasons and usage, to the token, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from mixtral_server.routes.specs import seed_of
from mixtral_worker.prompt import Message, encode_chat
from support.house import Program
from support.http import PATIENCE_S
from support.live_server import LiveServer
from support.toy_model import FORMAT, ToyTokenizer, answer_to

CHAT: Any = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}], "seed": 5}
PROMPT_TOKENS = len(encode_chat(ToyTokenizer(), [Message("user", "hello")], FORMAT))
WHOLE = answer_to("hello", 5, 20)


@pytest.fixture
async def client(server: LiveServer, tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    flags = ["--api_server", server.url, "--token_ms", "0"]
    worker = Program("support.toy_worker", flags, tmp_path / "worker.log", MIXTRAL_WORKER_KEY=server.worker_key)
    worker.start()
    try:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, max_retries=0, timeout=PATIENCE_S) as client:
            yield client
    finally:
        worker.kill()


async def both(client: openai.AsyncOpenAI, **more: Any) -> tuple[str, str, int, int]:
    """(text, finish, prompt tokens, completion tokens), the same whole and streamed."""
    answer = await client.chat.completions.create(**CHAT | more)
    assert answer.usage is not None
    choice, usage = answer.choices[0], answer.usage
    whole = (choice.message.content or "", str(choice.finish_reason), usage.prompt_tokens, usage.completion_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    stream = await client.chat.completions.create(**CHAT | more, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    last = chunks[-1].usage
    assert last is not None
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text, [finish] = "".join(one.delta.content or "" for one in choices), [one.finish_reason for one in choices if one.finish_reason]
    assert (text, finish, last.prompt_tokens, last.completion_tokens) == whole
    return whole


def text_of(tokens: int) -> str:
    return answer_to("hello", 5, tokens).text


async def test_answer_that_max_tokens_cuts_has_that_many_tokens_and_finish_length(client: openai.AsyncOpenAI) -> None:
    assert await both(client, max_tokens=12) == (text_of(12), "length", PROMPT_TOKENS, 12)


async def test_stop_text_ends_the_answer_before_it_and_its_tokens_are_counted(client: openai.AsyncOpenAI) -> None:
    seventh = WHOLE.text.split()[5]  # the first five tokens are three words and one letter
    upto = next(count for count in range(1, 21) if seventh in text_of(count))
    assert await both(client, max_tokens=20, stop=[seventh]) == (WHOLE.text[: WHOLE.text.index(seventh)], "stop", PROMPT_TOKENS, upto)


async def test_stop_token_ends_the_answer_without_its_text_and_is_counted(client: openai.AsyncOpenAI) -> None:
    assert await both(client, max_tokens=20, extra_body={"stop_token_ids": [WHOLE.ids[6]]}) == (text_of(6), "stop", PROMPT_TOKENS, 7)


async def test_stop_token_in_the_last_place_is_a_stop_and_no_length(client: openai.AsyncOpenAI) -> None:
    assert await both(client, max_tokens=7, extra_body={"stop_token_ids": [WHOLE.ids[6]]}) == (text_of(6), "stop", PROMPT_TOKENS, 7)


async def test_n_answers_are_those_of_their_seeds_and_come_again(client: openai.AsyncOpenAI) -> None:
    expected = [answer_to("hello", seed_of(5, index), 12).text for index in range(4)]
    assert len(set(expected)) == 4
    for _ in range(2):
        answer = await client.chat.completions.create(**CHAT, n=4, max_tokens=12)
        assert [choice.message.content for choice in answer.choices] == expected
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, 48)


async def test_continued_answer_begins_after_what_there_is(client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Once"}]
    prompt = encode_chat(ToyTokenizer(), [Message("user", "hello"), Message("assistant", "Once")], FORMAT)
    text, finish, prompt_tokens, tokens = await both(client, messages=messages, max_tokens=3, extra_body={"continue_final_message": True})
    assert not text.startswith("Once")
    assert (finish, prompt_tokens, tokens) == ("length", len(prompt), 3)
