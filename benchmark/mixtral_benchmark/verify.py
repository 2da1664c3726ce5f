"""Whether a stream said what the log says: offsets 1..n once each, in order, and the same text.

Pure. Decides what a wrong stream is; wires.py feeds it, and fetches the log's view of the job. Order is checked in every run
that carries offsets, because counts rest on it; text is kept and compared only under --verify.
"""

from __future__ import annotations

from mixtral_benchmark.measure import Failure
from mixtral_client.protocol import JobView


class Transcript:
    """What one native stream has said so far."""

    def __init__(self, keep_text: bool) -> None:
        self.offset = 0
        self._texts: list[str] | None = [] if keep_text else None

    def token(self, offset: int, text: str) -> Failure | None:
        if offset != self.offset + 1:
            wrong = "repeat" if offset <= self.offset else "gap"
            return Failure(f"stream_{wrong}", f"token {self.offset + 1} was due; the stream sent token {offset}")
        self.offset = offset
        if self._texts is not None:
            self._texts.append(text)
        return None

    def rewind(self, to: int) -> Failure | None:
        """The log lost the tokens after `to`, and they come anew."""
        if not 0 <= to <= self.offset:
            return Failure("stream_gap", f"the stream, at token {self.offset}, rewound to token {to}")
        self.offset = to
        if self._texts is not None:
            del self._texts[to:]
        return None

    def compare(self, view: JobView, usage_tokens: int | None) -> Failure | None:
        """The stream against the log's own view of the job; needs keep_text."""
        text = "".join(self._texts or [])
        if view.tokens != self.offset:
            return Failure("verify_count", f"the stream had {self.offset} tokens; the log has {view.tokens}")
        if usage_tokens != self.offset:
            return Failure("verify_usage", f"the stream had {self.offset} tokens; its usage says {usage_tokens}")
        if view.text != text:
            return Failure("verify_text", f"stream and log differ from character {_first_difference(text, view.text)} of {len(view.text)}")
        if view.state != "done":
            return Failure("verify_state", f"the stream said done; the log says {view.state}")
        return None


def _first_difference(one: str, other: str) -> int:
    """Counted from 1."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False), 1) if a != b), min(len(one), len(other)) + 1)
