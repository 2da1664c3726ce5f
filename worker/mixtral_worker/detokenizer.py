"""A stream of token ids to a stream of text.

Decides which text may leave: never half a character, never a stop string or what may become one. Leaves ids to bytes to tokenizer.py.

The text is a function of the ids alone, not of how they were cut into pushes: the bytes of all ids in a row, without SentencePiece's one
blank in front, read as UTF-8, where each longest run of bytes that cannot become a character is one U+FFFD (as Unicode recommends and
Python does), cut before the first stop string that is complete. `sent_bytes` counts that text in UTF-8 (three bytes for each U+FFFD), so a
Detokenizer made anew from the ids so far and sent_bytes goes on exactly where the other left off.
"""

import codecs
from collections.abc import Sequence

from mixtral_worker.tokenizer import Tokenizer


class Detokenizer:
    """Text of one answer. strip_leading_blank drops the blank that SentencePiece puts before a text: False where a message is continued.

    In the text that the first min_tokens tokens set free no stop string is looked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        produced_ids: Sequence[int] = (),
        sent_bytes: int = 0,
        strip_leading_blank: bool = True,
        min_tokens: int = 0,
    ) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty; every answer would end before it begins: leave it out")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = strip_leading_blank
        self._held = ""  # decoded, not yet sent: the tail that may become a stop string
        self._min_tokens = min_tokens
        self._tokens = len(produced_ids)
        self.stopped = False
        self.sent_bytes = 0
        heads, tails = produced_ids[:min_tokens], produced_ids[min_tokens:]
        text = self._take(b"".join(map(self._bytes_of, heads)), may_stop=False) + self._take(b"".join(map(self._bytes_of, tails)))
        self._unsent = self._skip(text, sent_bytes)

    def push(self, token_id: int) -> str:
        """The text that may leave now that this token is known; "" while a character or stop string may be incomplete, and once stopped."""
        self._tokens += 1
        return self._send(self._take(self._bytes_of(token_id), may_stop=self._tokens > self._min_tokens))

    def flush(self) -> str:
        """The rest, at the end of the answer: nothing more is to come, so what was held back leaves and half a character is U+FFFD."""
        text = self._take(b"", final=True)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return self._send(text)

    def _bytes_of(self, token_id: int) -> bytes:
        text_bytes = self._tokenizer.token_bytes(token_id)
        if text_bytes and self._strip_next:
            self._strip_next = False
            return text_bytes.removeprefix(b" ")
        return text_bytes

    def _take(self, text_bytes: bytes, final: bool = False, may_stop: bool = True) -> str:
        """Text that these bytes set free."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(text_bytes, final)
        if not may_stop:
            free, self._held = self._held, ""
            return free
        ends = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            keep = min(ends)[1]
        else:
            keep = len(self._held) - self._possible_stop_chars()
        free, self._held = self._held[:keep], self._held[keep:]
        return free

    def _possible_stop_chars(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max((self._overlap(stop) for stop in self._stop), default=0)

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((chars for chars in range(longest, 0, -1) if self._held.endswith(stop[:chars])), 0)

    def _skip(self, text: str, sent_bytes: int) -> str:
        """What is left of text after the bytes that have left before."""
        whole = text.encode()
        if sent_bytes > len(whole):
            raise ValueError(f"sent_bytes is {sent_bytes}, but the ids so far set only {len(whole)} bytes of text free")
        try:
            left = whole[sent_bytes:].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"sent_bytes is {sent_bytes}, which is inside a character of the text so far") from error
        self.sent_bytes = sent_bytes
        return left

    def _send(self, text: str) -> str:
        text, self._unsent = self._unsent + text, ""
        self.sent_bytes += len(text.encode())
        return text
