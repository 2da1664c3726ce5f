"""What an AIME worker is told of a job, and which jobs it cannot serve because it is not told enough."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_client.protocol import ChatMessage, JobSpec, Sampling
from mixtral_server.aime_queue import AimeJob
from mixtral_server.descriptions import values_of
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.records import Parameters
from mixtral_server.routes.aime_inputs import content_of_values, inputs_of
from mixtral_server.routes.aime_jobs import job_data_of, needs_native, progress_post, result_post

CHAT = EndpointConfig(name="chat")
TEXT = EndpointConfig.model_validate({"name": "text", "inputs": {"prompt_input": {"type": "string", "max_length": 5}}, "temperature": 0.5})
SHORT = EndpointConfig.model_validate(
    {"name": "short", "inputs": {"chat_context": {"type": "json"}, "max_gen_tokens": {"type": "integer", "maximum": 100}}}
)
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
HELLO = [ChatMessage(role="user", content="hello")]


def spec(**more: Any) -> JobSpec:
    sampling = Sampling(**SAMPLING | more.pop("sampling", {}))
    return JobSpec(**{"max_tokens": 50, "seed": 1, "sampling": sampling, **more})


@pytest.mark.parametrize(
    ("endpoint", "content", "is_closed"),
    [
        (CHAT, spec(messages=HELLO), False),
        (CHAT, spec(prompt="Once"), False),
        (CHAT, spec(prompt="Once", stop=[], logprobs=None, stop_token_ids=[], min_tokens=0), False),
        (CHAT, spec(prompt=[1, 2]), True),
        (CHAT, spec(messages=HELLO, has_own_seed=True), True),
        (CHAT, spec(messages=HELLO, sampling={"logit_bias": {5: 1.0}}), True),
        (CHAT, spec(messages=HELLO, sampling={"temperature": 1.01}), True),
        (CHAT, spec(messages=HELLO, top_logprobs=0), True),
        (CHAT, Parameters(parameters={}, max_tokens=1, likely_tokens=1), False),
        (SHORT, spec(messages=HELLO), False),
        (SHORT, spec(messages=HELLO, max_tokens=101), True),
        (SHORT, spec(messages=HELLO, sampling={"temperature": 0.7}), True),
        (SHORT, spec(prompt="Once"), True),
        (TEXT, spec(prompt="Once", sampling={"temperature": 0.5}), True),
        (TEXT, spec(prompt="Once", sampling={"temperature": 0.5}, max_tokens=2000), False),
        (TEXT, spec(prompt="Once upon", sampling={"temperature": 0.5}, max_tokens=2000), True),
        (TEXT, spec(messages=HELLO, sampling={"temperature": 0.5}, max_tokens=2000), True),
    ],
)
def test_job_is_for_native_workers_if_any_part_of_it_would_not_be_told(endpoint: EndpointConfig, content: Any, is_closed: bool) -> None:
    assert needs_native(content, endpoint) is is_closed


def test_worker_is_told_no_input_that_its_endpoint_lacks() -> None:
    job = AimeJob("id", 1, spec(messages=HELLO), 5.0)
    assert job_data_of(job, "id#1", SHORT, 6.0) == {
        "chat_context": [{"role": "user", "content": "hello"}],
        "max_gen_tokens": 50,
        "job_id": "id#1",
        "start_time": 5.0,
        "start_time_compute": 6.0,
    }


@pytest.mark.parametrize("count", [True, -1, 2.5, "3", None, [3]])
def test_count_that_is_none_is_not_counted_by(count: object) -> None:
    post = progress_post("id", 1, {"progress": None, "progress_data": {"text": "a", "num_generated_tokens": count}}, CHAT)
    assert (post.text, post.tokens) == ("a", None)
    assert result_post("id", 1, {"text": "a", "num_generated_tokens": count}, CHAT).tokens is None


def test_prompts_tokens_are_what_the_context_has_beside_the_answers() -> None:
    result = {"text": "a", "num_generated_tokens": 3, "current_context_length": 10}
    assert result_post("id", 1, result, CHAT).prompt_tokens == 7
    assert result_post("id", 1, result | {"current_context_length": 2}, CHAT).prompt_tokens == 0
    assert result_post("id", 1, result | {"current_context_length": None}, CHAT).prompt_tokens is None


def test_job_of_aimes_own_clients_is_open_wherever_it_is_a_chat() -> None:
    for endpoint in (CHAT, TEXT, SHORT):
        chat, text = {"chat_context": '[{"role": "user", "content": "hello"}]'}, {"prompt_input": "Once"}
        given = chat if "chat_context" in endpoint.job_inputs else text
        values = values_of(given, inputs_of(endpoint))
        assert not needs_native(content_of_values(values, endpoint, 5), endpoint), endpoint.name
