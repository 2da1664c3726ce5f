"""Server-sent events: bytes in, events out, by the WHATWG event-stream rules, wherever the network split the bytes.

Decides what an event is and how large one may grow. Leaves to its callers what events mean and when to reconnect.
The twin of the JavaScript client's sse.js; both pass the same golden fixtures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixtral_client.errors import EventTooLarge

MAX_EVENT_BYTES = 1 << 20
MAX_RETRY_MS = 86_400_000
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """event is "message" where the stream names none; id is the last id the stream has named, with this event or before it."""

    event: str
    data: str
    id: str


class SseDecoder:
    """Decoder of one response body. An event that the body ends in the middle of is never given."""

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.retry_ms: int | None = None
        self.last_id = ""
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()
        self._is_first_line = True
        self._after_cr = False
        self._event = ""
        self._data: list[str] = []
        self._data_bytes = 0

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes of the body; give the events they complete. Raises EventTooLarge."""
        if not chunk:
            return []
        if self._after_cr:  # the second half of a CRLF that was split
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        events = []
        for piece in chunk.splitlines(keepends=True):  # bytes split at CR, LF and CRLF only
            self._line += piece
            if len(self._line) + self._data_bytes > self._max_event_bytes:
                raise EventTooLarge(self._max_event_bytes)
            if piece.endswith((b"\r", b"\n")):
                event = self._take_line(bytes(self._line).rstrip(b"\r\n"))
                self._line.clear()
                if event is not None:
                    events.append(event)
        return events

    def _take_line(self, line: bytes) -> ServerSentEvent | None:
        if self._is_first_line:
            line = line.removeprefix(BOM)
            self._is_first_line = False
        if line:
            # No UTF-8 sequence spans a line end, so a line decodes alone as it would in the whole stream.
            self._take_field(line.decode("utf-8", errors="replace"), len(line))
            return None
        event = ServerSentEvent(self._event or "message", "\n".join(self._data), self.last_id) if self._data else None
        self._event, self._data, self._data_bytes = "", [], 0
        return event

    def _take_field(self, line: str, line_bytes: int) -> None:
        name, _, value = line.partition(":")  # an empty name is a comment
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._data_bytes += line_bytes
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self.last_id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            self.retry_ms = min(int(value.lstrip("0")[:12] or "0"), MAX_RETRY_MS)
