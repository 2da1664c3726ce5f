"""One event → the bytes of a server-sent event. Pure; when and what to send is decided in routes/.

Text never breaks a frame: data is JSON on one line, ids and names are ours.
"""

from __future__ import annotations

from typing import Any

import orjson

from mixtral_client.protocol import JobEvent

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx and its kin must pass each event on at once
}
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def encode(event: JobEvent, event_id: str | None = None) -> bytes:
    """A native event: its name, its id when it has one, its fields as JSON."""
    fields = event.model_dump(mode="json", exclude={"event"})
    return b"event: %b\n%b" % (event.event.encode(), chunk(fields, event_id))


def chunk(body: dict[str, Any], event_id: str | None = None) -> bytes:
    """A nameless event, as OpenAI's streams use them."""
    line = b"data: %b\n\n" % orjson.dumps(body)
    return line if event_id is None else b"id: %b\n%b" % (event_id.encode(), line)


def retry(wait_ms: int) -> bytes:
    """How long a reader waits before it comes back after a broken connection."""
    return b"retry: %d\n\n" % wait_ms
