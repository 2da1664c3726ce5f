"""Names of keys and ids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_server.keys import KEYS, Shard, key_kind, shard_of

endpoint_names = st.from_regex(r"[a-z][a-z0-9_]{0,39}", fullmatch=True)


@given(endpoint_names, st.integers(0, 9999))
def test_an_id_names_its_endpoint_and_shard(endpoint: str, number: int) -> None:
    assert shard_of(Shard(endpoint, number).new_id()) == Shard(endpoint, number)


def test_ids_do_not_repeat() -> None:
    assert len({Shard("mixtral_chat").new_id() for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mixtral_chat",
        "mixtral_chat.0",
        "mixtral_chat.0-",
        "mixtral_chat.0-" + "0" * 31,
        "mixtral_chat.0-" + "0" * 33,
        "mixtral_chat.0-" + "G" * 32,
        "mixtral_chat-" + "0" * 32,
        "mixtral}chat.0-" + "0" * 32,
        "mixtral_chat.0-" + "0" * 32 + "\n",
        "mixtral_chat.0:job:x-" + "0" * 32,
        "x" * 200 + ".0-" + "0" * 32,
    ],
)
def test_a_text_that_is_no_id_names_nothing(text: str) -> None:
    assert shard_of(text) is None


@given(endpoint_names)
def test_all_keys_of_an_endpoint_begin_with_one_hash_tag(endpoint: str) -> None:
    shard = Shard(endpoint)
    keys = [shard.live, shard.wake, *(shard.key(kind.pattern[1:]) for kind in KEYS)]
    assert {key[: key.index("}") + 1] for key in keys} == {f"{{{endpoint}.0}}"}


@given(st.sampled_from(KEYS), endpoint_names, st.text(min_size=1))
def test_a_key_is_recognised_whatever_its_user_is_called(kind, endpoint: str, user: str) -> None:  # type: ignore[no-untyped-def]
    rest = kind.pattern.replace("<user>", user).replace("<level>", "3").replace("<id>", "x").replace("<session>", "y").replace("<key>", "k")
    assert key_kind(f"{{{endpoint}.0}}{rest}") == kind


def test_a_key_of_no_kind_is_not_recognised() -> None:
    assert key_kind("{mixtral_chat.0}:nothing") is None
    assert key_kind("mixtral_chat.0:tick") is None
