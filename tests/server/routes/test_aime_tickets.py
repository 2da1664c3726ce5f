"""Job ids and session keys of AIME's wire: what was not made with the servers' secret opens nothing."""

from __future__ import annotations

import base64

from hypothesis import given
from hypothesis import strategies as st

from mixtral_server.routes.aime_tickets import Tickets

SECRET = bytes(range(32))


@given(st.text(max_size=100))
def test_session_key_opens_at_every_server_with_the_secret_and_at_no_other(key: str) -> None:
    session_key = Tickets(SECRET).session_key(key)
    assert Tickets(SECRET).key_of(session_key) == key
    assert Tickets(bytes(32)).key_of(session_key) is None


def test_session_key_does_not_show_the_key_and_is_new_each_time() -> None:
    tickets = Tickets(SECRET)
    first, second = tickets.session_key("mx-c-secret"), tickets.session_key("mx-c-secret")
    assert first != second
    assert "secret" not in first


@given(st.integers(0, 80), st.integers(1, 255))
def test_changed_session_key_opens_nothing(at: int, by: int) -> None:
    session_key = Tickets(SECRET).session_key("mx-c-secret").encode()
    changed = bytearray(session_key)
    changed[at % len(changed)] ^= by
    opened = Tickets(SECRET).key_of(changed.decode("latin-1"))
    # base64 has several spellings of the same bytes: "+" for "-", and last characters with bits that mean nothing
    assert opened is None or base64.urlsafe_b64decode(changed) == base64.urlsafe_b64decode(session_key)


@given(st.text(max_size=100))
def test_what_was_not_made_here_opens_nothing(text: str) -> None:
    assert Tickets(SECRET).key_of(text) is None
    assert Tickets(SECRET).job_of(text) is None


def test_job_ids_count_from_1_and_open_their_job_whatever_their_number() -> None:
    tickets = Tickets(SECRET)
    first, second = tickets.of_job("chat.0-aa"), tickets.of_job("chat.0-bb")
    assert [one.split("#")[1] for one in (first, second)] == ["1", "2"]
    assert Tickets(SECRET).job_of(first) == Tickets(SECRET).job_of(first.partition("#")[0]) == "chat.0-aa"
    assert Tickets(bytes(32)).job_of(first) is None
    assert tickets.job_of(first.replace("aa", "bb")) is None
