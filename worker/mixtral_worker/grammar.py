"""Answers that are JSON: which tokens keep to a schema.

Decides the text that a schema allows and what is refused: a schema that cannot be compiled, or is too much work at any step. llguidance
does the grammar, an optional extra. Compiling and masks run in threads of their own, beside the forward pass: a job enters the batch once
its grammar is ready (loop.py), and penalties.py puts masks on logits. The state follows from the answer's ids alone, so that a job that
moved goes on where it was.

The text is bound as the reader gets it, byte for byte: one blank in front is allowed, which SentencePiece puts there and the detokenizer
takes away. White space between tokens of JSON is at most MAX_SPACE characters: a model that likes blanks would send them for ever.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SPACE = 20
MASK_THREADS = 4  # llguidance lets go of Python's lock while it works
COMPILE_WITHIN_S = 5.0
MAX_PATTERN_PROPERTIES = 32  # compiling compares each with every other: 300 of them took 8 s, other schemas of that size 0.2 s
# Work that one schema may cause, in llguidance's units: by its documentation 50 (build), 14 (lexer) and 20 (parser) thousand to a ms.
BUILD_FUEL = 1_000_000
STEP_FUEL = 200_000
STEP_ITEMS = 50_000
MAX_SYMBOLS = 100_000

Mask: TypeAlias = npt.NDArray[np.bool_]
Clock: TypeAlias = Callable[[], float]


class GrammarRefused(ValueError):
    """A response format that this worker cannot hold an answer to. `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Vocabulary(Protocol):
    """What a grammar must know of a tokenizer."""

    vocab_size: int
    eos_id: int
    bos_id: int

    def encode(self, text: str, leading_blank: bool = True) -> list[int]: ...

    def token_bytes(self, id: int) -> bytes: ...

    def bytes_to_ids(self, text_bytes: bytes) -> list[int]: ...


class Grammars:
    """Makes the grammars of one worker; the vocabulary is read at the first of them."""

    def __init__(self, vocabulary: Vocabulary, clock: Clock = time.monotonic) -> None:
        self._vocabulary, self._clock = vocabulary, clock

    def compile(self, schema: str, produced_ids: Sequence[int] = (), begun: str = "") -> Grammar:
        """Begin to compile, for an answer that has these ids already; begun is the text that the answer continues.

        Raises GrammarRefused where the extra is not installed; what else is wrong shows in `Grammar.is_ready`.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise GrammarRefused(
                "response_format_unavailable",
                "response_format needs the package llguidance, which this worker lacks; "
                "install it there (pip install 'mixtral-chat[structured]') or ask for text",
            )
        matcher = self._compiling.submit(self._matcher, json.loads(schema), begun, list(produced_ids))
        return Grammar(matcher, self._masking, self._vocabulary.vocab_size, len(produced_ids), self._clock)

    @cached_property
    def _compiling(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="grammar-compile")

    @cached_property
    def _masking(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="grammar-mask")

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        return LLTokenizer(_Wrapped(self._vocabulary))  # type: ignore[arg-type]

    def _matcher(self, schema: dict[str, Any], begun: str, produced_ids: list[int]) -> LLMatcher:
        patterns = _count("patternProperties", schema)
        if patterns > MAX_PATTERN_PROPERTIES:
            raise _refused(f"patternProperties may have {MAX_PATTERN_PROPERTIES} entries at most; got {patterns}")
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            initial_lexer_fuel=BUILD_FUEL,
            step_lexer_fuel=STEP_FUEL,
            step_max_items=STEP_ITEMS,
            max_grammar_size=MAX_SYMBOLS,
            verbose_errors=False,
        )
        options = {"x-guidance": {"whitespace_pattern": rf"[ \t\r\n]{{0,{MAX_SPACE}}}"}}
        grammar = f'start: " "? answer\nanswer: %json {json.dumps({**schema, **options})}\n'
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        if begun and not matcher.consume_tokens(self._vocabulary.bytes_to_ids(begun.encode())):
            raise _refused("the assistant's message that is to be continued does not begin what it allows")
        if produced_ids and not matcher.consume_tokens(produced_ids):
            raise _refused(f"the answer's first {len(produced_ids):,} tokens do not keep to it")
        return matcher


class Grammar:
    """What one answer must keep to. Used from one thread: `is_ready` until it is; then `look_ahead` and `mask` once for every token."""

    def __init__(self, matcher: Future[LLMatcher], threads: ThreadPoolExecutor, vocab_size: int, taken: int, clock: Clock) -> None:
        self._matcher = matcher
        self._threads = threads
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)
        self._vocab_size = vocab_size
        self._taken = taken
        self._clock, self._began_s = clock, clock()
        self._mask: Future[Mask] | None = None
        self.error = ""

    def is_ready(self) -> bool:
        """Whether the schema is compiled. Raises GrammarRefused for one that cannot be, or took too long."""
        if not self._matcher.done():
            if self._clock() - self._began_s > COMPILE_WITHIN_S:
                raise _refused(f"compiling it took more than {COMPILE_WITHIN_S:g} s")
            return False
        self._matcher.result()
        return True

    def look_ahead(self, produced_ids: Sequence[int]) -> None:
        """Begin to work out which tokens may follow these, in another thread."""
        news, self._taken = list(produced_ids[self._taken :]), len(produced_ids)
        if news or self._mask is None:  # a step that is tried again needs no other mask
            self._mask = self._threads.submit(self._next, news)

    def mask(self) -> Mask | None:
        """Which ids may come next, [V]; never none of them. None when the grammar failed: `error` says why, and the answer cannot go on."""
        assert self._mask is not None, "look_ahead comes first"
        try:
            return self._mask.result()
        except GrammarRefused as refused:
            self.error = str(refused)
            return None

    def _next(self, news: list[int]) -> Mask:
        matcher = self._matcher.result()
        if news:
            matcher.consume_tokens(news)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if matcher.is_error():
            raise _refused(f"at token {self._taken + 1:,} it is too much work: {matcher.get_error()}")
        mask = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size].view(np.bool_)
        if not mask.any():
            raise _refused(f"at token {self._taken + 1:,} it allows nothing more")
        return mask


class _Wrapped:
    """A vocabulary as llguidance reads one. Tokens without a text are special: of these a grammar allows the end of the sequence alone."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id, self.bos_token_id = vocabulary.eos_id, vocabulary.bos_id
        texts = [vocabulary.token_bytes(id) for id in range(vocabulary.vocab_size)]
        self.tokens = [text or b"<|%d|>" % id for id, text in enumerate(texts)]
        self.special_token_ids = [id for id, text in enumerate(texts) if not text]

    def __call__(self, text: str) -> list[int]:
        """Where only one text may follow, it must come in these tokens: those that the model learned."""
        return self._vocabulary.encode(text, leading_blank=False)


def _refused(problem: str) -> GrammarRefused:
    short = " ".join(problem.rpartition("failed to compile JSON schema: ")[2].partition("1 | start:")[0].split())
    return GrammarRefused("response_format_refused", f"response_format cannot be kept: {short[:300]}; change the schema")


def _count(name: str, schema: Any) -> int:
    """How many entries objects under this name have, anywhere in the schema."""
    if isinstance(schema, list):
        return sum(_count(name, one) for one in schema)
    if not isinstance(schema, dict):
        return 0
    own = schema.get(name)
    return (len(own) if isinstance(own, dict) else 0) + sum(_count(name, one) for one in schema.values())
