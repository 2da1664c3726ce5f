"""AIME's own endpoint files, in their form, written here by hand: what of them means something, and what is said of the rest."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

from mixtral_server.endpoints import EndpointConfig, EndpointError, read_endpoints

CHAT = """
[ENDPOINT]
title = "A chat"
name = "mixtral_chat"
description = "Talks"
methods = ["GET", "POST"]
version = 2
category = "chat"
max_queue_length = 50
max_time_in_queue = 120
job_inactivity_timeout = 90
result_lifetime = 600

[WORKER]
job_type = "mixtral"
auth_key = "worker-secret"
request_timeout = 30

[CLIENTS]
authorization_keys = { alice = "client-secret" }
provide_worker_meta_data = true

[INPUTS]
prompt_input = { type = "string", default = "" }
chat_context = { type = "json", default = "" }
top_k = { type = "integer", minimum = 1, maximum = 1000, default = 40 }
top_p = { type = "float", min = 0.0, max = 1.0, default = 0.9 }

[OUTPUTS]
text = { type = "string" }
num_generated_tokens = { type = "integer" }

[PROGRESS.OUTPUTS]
text = { type = "string" }
"""

IMAGE = """
[ENDPOINT]
name = "upscale"
demo_page = "x"
[WORKER]
job_type = "upscale"
[SESSION.VARS]
last = { type = "string" }
[INPUTS]
image.type = "image"
image.required = true
image.auto_convert = true
image.format = { supported = ["png"], default = "png", auto_convert = true }
image.size = { max = [1024, 1024] }
mask.type = "image"
mask.format = { supported = ["png"] }
[OUTPUTS]
image = { type = "image", format = "png" }
[STATIC]
"/upscale" = { file = "x.html" }
"""


def read(folder: Path, text: str) -> EndpointConfig:
    path = folder / "some_model" / "aime_api_endpoint.cfg"
    path.parent.mkdir()
    path.write_text(text)
    [endpoint] = read_endpoints(folder).values()
    return endpoint


def test_aimes_file_of_a_chat_is_read_as_it_is(tmp_path: Path) -> None:
    chat = read(tmp_path, CHAT)
    assert (chat.name, chat.title, chat.description, chat.version, chat.category) == ("mixtral_chat", "A chat", "Talks", 2, "chat")
    assert (chat.max_waiting, chat.queue_timeout_s, chat.keep_s) == (50, 120, 600)
    assert (chat.job_types, chat.worker.request_timeout_s, chat.worker.job_silence_s) == ({"mixtral", "mixtral_chat"}, 30, 90)
    assert chat.is_chat
    assert (chat.inputs["top_p"].minimum, chat.inputs["top_k"].default) == (0.0, 40)
    assert (list(chat.outputs), list(chat.progress_outputs)) == (["text", "num_generated_tokens"], ["text"])
    assert chat.clients.provide_worker_meta_data


def test_of_keys_in_a_file_only_hashes_are_kept(tmp_path: Path) -> None:
    chat = read(tmp_path, CHAT)
    assert chat.worker.auth_key_sha256 == hashlib.sha256(b"worker-secret").hexdigest()
    assert chat.clients.key_names == {hashlib.sha256(b"client-secret").hexdigest(): "alice"}
    assert "secret" not in repr(chat) + chat.model_dump_json()
    assert EndpointConfig.model_validate(chat.model_dump(mode="json")) == chat, "as it is handed to another process"


def test_what_is_not_served_is_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    upscale = read(tmp_path, IMAGE)
    [line] = caplog.messages
    named = line.partition("not_served=")[2].split(", ")
    assert named == ["[SESSION]", "[STATIC]", "ENDPOINT.demo_page", "conversion of image.size", "conversion of image.format"]
    assert not upscale.is_chat
    assert (upscale.inputs["image"].supported, upscale.inputs["mask"].supported) == (None, ("png",))
    assert upscale.outputs["image"].model_dump() == {"type": "image", "format": "png"}


def test_key_that_everybody_knows_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    read(tmp_path, CHAT.replace("client-secret", "6a17e2a5-b706-03cb-1a32-94b4a1df67da"))
    assert "event=published_key" in caplog.text
    assert "6a17e2a5" not in caplog.text


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ('auth_key = ["worker-secret"]', "worker: a key must be a text that is not empty"),
        ('auth_key = ""', "worker: a key must be a text that is not empty"),
        ("request_timeout = 0", "worker.request_timeout_s: Input should be greater than or equal to 1"),
    ],
)
def test_wrong_value_is_refused_without_showing_what_may_be_a_key(tmp_path: Path, wrong: str, sentence: str) -> None:
    lines = [line for line in CHAT.splitlines() if not line.startswith(wrong.partition(" =")[0])]
    lines.insert(lines.index("[WORKER]") + 1, wrong)
    with pytest.raises(EndpointError, match=sentence) as refused:
        read(tmp_path, "\n".join(lines))
    assert "secret" not in str(refused.value)


def test_file_that_is_not_toml_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"aime_api_endpoint\.cfg is not TOML"):
        read(tmp_path, "[ENDPOINT")
