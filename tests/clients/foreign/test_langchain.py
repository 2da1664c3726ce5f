"""langchain-openai as a second opinion: what its chat and text models send, and what they make of the answers."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from support.json_worker import JsonWorker
from support.live_server import LiveServer
from support.scripted_worker import FULL_LENGTH, ScriptedWorker, answer_to, text_of
from support.worker_thread import WorkerThread


class Person(BaseModel):
    """Who is asked about."""

    name: str
    age: int


def chat(server: LiveServer, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, model="mixtral_chat", max_retries=0, timeout=20, **more)


def test_chat_is_invoked_with_usage_and_finish_reason(server: LiveServer, worker: ScriptedWorker) -> None:
    answer = chat(server, temperature=0.5, seed=3, max_tokens=4).invoke([SystemMessage("be brief"), HumanMessage("hello")])
    assert answer.content == text_of("system: be brief\nuser: hello", 4)
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 4
    assert (worker.seen[0].spec.seed, worker.seen[0].spec.sampling.temperature) == (3, 0.5)


def test_chat_is_streamed_with_usage(server: LiveServer, worker: ScriptedWorker) -> None:
    chunks = list(chat(server, stream_usage=True).stream("hello"))
    assert "".join(str(chunk.content) for chunk in chunks) == answer_to("hello")
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == FULL_LENGTH


async def test_many_chats_at_once_without_blocking(server: LiveServer, worker: ScriptedWorker) -> None:
    names = [f"number {number}" for number in range(6)]
    answers = await chat(server).abatch([[HumanMessage(name)] for name in names])
    assert [answer.content for answer in answers] == [answer_to(name) for name in names]


def test_conversation_and_n_answers(server: LiveServer, worker: ScriptedWorker) -> None:
    messages = [HumanMessage("hello"), AIMessage("Once"), HumanMessage("again")]
    result = chat(server, n=3).generate([messages])
    assert [one.text for one in result.generations[0]] == [text_of("user: hello\nassistant: Once\nuser: again")] * 3


def test_structured_output_is_the_object(server: LiveServer) -> None:
    with WorkerThread(server, JsonWorker):
        structured = chat(server).with_structured_output(Person, method="json_schema")
        assert structured.invoke("who?") == Person(name="Ann", age=30)


def test_bound_tools_are_refused_with_what_to_do(server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError, match="the model calls no tools; describe them in a message"):
        chat(server).bind_tools([Person]).invoke("hello")


def test_text_model_sends_its_prompts_in_one_request(server: LiveServer, worker: ScriptedWorker) -> None:
    model = OpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, model="mixtral_chat", max_retries=0, max_tokens=4, n=2)
    result = model.generate(["one", "two"])
    assert [[one.text for one in of_prompt] for of_prompt in result.generations] == [[text_of(one, 4)] * 2 for one in ("one", "two")]
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["completion_tokens"] == 16
    assert "".join(model.bind(n=1).stream("one")) == text_of("one", 4)
