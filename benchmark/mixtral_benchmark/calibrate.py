"""How many words make so many tokens, as the server itself counts.

Decides by two short probe chats, whose usage tells what the chat's frame costs and what a word costs. Needs no tokenizer, and so
works with any server that reports usage. Leaves the words to prompts.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from mixtral_benchmark.measure import Chat, Failure
from mixtral_benchmark.prompts import Talk, text_of
from mixtral_benchmark.wires import ChatFailed, Wire

SHORT_WORDS, LONG_WORDS = 20, 220


@dataclass(frozen=True)
class Ruler:
    """A prompt of w words has frame_tokens + w · tokens_per_word tokens, as far as two probes can tell."""

    frame_tokens: float
    tokens_per_word: float

    def words(self, tokens: int) -> int:
        """How many words come nearest to a prompt of so many tokens; at least one."""
        return max(1, round((tokens - self.frame_tokens) / self.tokens_per_word))

    def words_of(self, lengths: Iterable[int]) -> dict[int, int]:
        return {tokens: self.words(tokens) for tokens in lengths}


async def calibrate(wire: Wire, now_s: float) -> Ruler:
    """Raises ChatFailed where a probe fails or the server counts no prompt tokens, and what the wire raises."""
    short, long = [await _count(wire, words, now_s) for words in (SHORT_WORDS, LONG_WORDS)]
    if long <= short:
        raise ChatFailed(Failure("no_usage", f"{LONG_WORDS} words had {long} tokens and {SHORT_WORDS} words {short}: no count to go by"))
    per_word = (long - short) / (LONG_WORDS - SHORT_WORDS)
    return Ruler(short - SHORT_WORDS * per_word, per_word)


async def _count(wire: Wire, words: int, now_s: float) -> int:
    talk = Talk((text_of(words, random.Random(words)),), max_tokens=1, temperature=0.0)
    chat = Chat(index=0, scheduled_s=now_s, sent_s=now_s)
    await wire.have(talk.ask(0, ()), chat)
    if not chat.prompt_tokens:
        sentence = "the server reports no prompt tokens, which prompts of a given length need; give a text by --prompt instead"
        raise ChatFailed(Failure("no_usage", sentence))
    return chat.prompt_tokens
