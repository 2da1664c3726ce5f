"""One event → the bytes of a server-sent event. Pure; when and what to send is decided in routes/.

Text never breaks a frame: data is JSON on one line, ids and names are ours. Tokens are most of what is sent, and of a token's event only
id and text are its own: the rest of the bytes is made once for each stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from mixtral_client.protocol import JobEvent

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx and its kin must pass each event on at once
}
DONE = b"data: [DONE]\n\n"
PING = b": ping\n"
"""A comment, without an empty line after it: to the openai package an empty line ends an event, if ever an id was told, and it fails at one
without data."""


def encode(event: JobEvent, event_id: str | None = None) -> bytes:
    """A native event: its name, its id when it has one, its fields as JSON."""
    fields = event.model_dump(mode="json", exclude={"event"})
    return b"event: %b\n%b" % (event.event.encode(), chunk(fields, event_id))


def chunk(body: dict[str, Any], event_id: str | None = None) -> bytes:
    """A nameless event, as OpenAI's streams use them."""
    line = b"data: %b\n\n" % orjson.dumps(body)
    return line if event_id is None else b"id: %b\n%b" % (event_id.encode(), line)


HOLE = "\0"
"""Stands in a chunk's body where the text of each token belongs."""


def token_pattern(body: dict[str, Any]) -> bytes:
    """The bytes of a token's nameless event but for offset, crc and text: for token_events()."""
    before, _, after = orjson.dumps(body).replace(b"%", b"%%").partition(orjson.dumps(HOLE))
    return b"id: %%d.%%08x\ndata: %b%%b%b\n\n" % (before, after)


def token_events(pattern: bytes, rows: Sequence[tuple[int, int, str]]) -> bytes:
    """An event for each (offset, crc, text)."""
    if len(rows) == 1:  # as nearly always
        offset, crc, text = rows[0]
        return pattern % (offset, crc, orjson.dumps(text))
    return b"".join([pattern % (offset, crc, orjson.dumps(text)) for offset, crc, text in rows])


_NATIVE = b'event: token\nid: %d.%08x\ndata: {"offset":%d,"text":%b}\n\n'
_NATIVE_WITH_LOGPROBS = b'event: token\nid: %d.%08x\ndata: {"offset":%d,"text":%b,"logprobs":%b}\n\n'


def native_token_events(rows: Sequence[tuple[int, int, str]], logprobs: Iterable[str] | None = None) -> bytes:
    """What encode() makes of each TokenEvent. logprobs: a TokenLogprobs for each, as JSON on one line."""
    if logprobs is not None:
        both = zip(rows, logprobs, strict=True)
        return b"".join(
            [_NATIVE_WITH_LOGPROBS % (offset, crc, offset, orjson.dumps(text), one.encode()) for (offset, crc, text), one in both]
        )
    if len(rows) == 1:
        offset, crc, text = rows[0]
        return _NATIVE % (offset, crc, offset, orjson.dumps(text))
    return b"".join([_NATIVE % (offset, crc, offset, orjson.dumps(text)) for offset, crc, text in rows])


def retry(wait_ms: int) -> bytes:
    """How long a reader waits before it comes back after a broken connection."""
    return b"retry: %d\n\n" % wait_ms
