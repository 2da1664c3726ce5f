"""A model that is a hash: its next token follows from the seed and every id before it, so each answer can be checked to the last byte.

Decides the vocabulary, the next id and the whole answer to a chat. Every fifth token is half a letter and the one after it the other half,
so that a chat that moves in between shows whether text leaves whole. Leaves the process to toy_worker.py.
"""

from __future__ import annotations

import os
import signal
import time
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_worker.blocks import BLOCK_SIZE
from mixtral_worker.plan import StepPlan
from mixtral_worker.prompt import Message, encode_chat
from mixtral_worker.tokenizer import Tokenizer

FORMAT = "mistral"
CONTROLS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
FIRST_BYTE = len(CONTROLS)
FIRST_WORD = FIRST_BYTE + 256
WORDS = 30_000


class ToyTokenizer(Tokenizer):
    """Bytes, words that are numbers, and every template mark as a control id."""

    def __init__(self) -> None:
        self.path = Path("toy")
        self.vocab_size = FIRST_WORD + WORDS
        self.bos_id, self.eos_id = CONTROLS.index("<s>"), CONTROLS.index("</s>")

    def encode(self, text: str, leading_blank: bool = True) -> list[int]:
        return self.bytes_to_ids(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        if id >= FIRST_WORD:
            return b"w%d " % (id - FIRST_WORD)
        return bytes([id - FIRST_BYTE]) if id >= FIRST_BYTE else b""

    def bytes_to_ids(self, text_bytes: bytes) -> list[int]:
        return [FIRST_BYTE + byte for byte in text_bytes]

    def piece(self, id: int) -> str:
        return CONTROLS[id]

    def is_byte(self, id: int) -> bool:
        return FIRST_BYTE <= id < FIRST_WORD

    def control_id(self, piece: str) -> int | None:
        return CONTROLS.index(piece) if piece in CONTROLS else None


def next_id(before: Sequence[int], offset: int, seed: int) -> int:
    """The token at this 1-based offset of an answer, after all ids before it."""
    drawn = zlib.crc32(array("I", before).tobytes(), seed & 0xFFFFFFFF)
    if offset % 5 == 3:
        return FIRST_BYTE + 0xC3
    if offset % 5 == 4:
        return FIRST_BYTE + 0x80 + drawn % 64
    return FIRST_WORD + drawn % WORDS


class ToyEngine:
    """Stands where the engine does. What it knows of a chat is what was written to the chat's KV blocks, as with a real one.

    A step takes step_s. A chat that names the poison kills the process, as a bad kernel would.
    """

    def __init__(self, num_blocks: int, step_s: float = 0.0, poison: str = "") -> None:
        self._blocks = [[0] * BLOCK_SIZE for _ in range(num_blocks)]
        self._step_s = step_s
        self._poison = poison
        self.sample_s = 0.0

    def expert_tokens(self) -> None:
        """It has no experts."""

    def step(self, plan: StepPlan) -> list[int]:
        time.sleep(self._step_s)
        next_ids = []
        for row in plan.rows:
            for position, token in enumerate(row.tokens, row.start):
                self._blocks[row.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE] = token
            if row.samples:
                next_ids.append(next_id(self._context(row.blocks, row.end), row.offset, row.sampling.seed))
            if self._poison and self._poison in ToyTokenizer().decode(self._context(row.blocks, row.end)):
                os.kill(os.getpid(), signal.SIGKILL)
        return next_ids

    def _context(self, blocks: Sequence[int], end: int) -> list[int]:
        return [token for block in blocks for token in self._blocks[block]][:end]


@dataclass(frozen=True)
class ToyAnswer:
    ids: list[int]
    text: str


def answer_to(content: str, seed: int, tokens: int) -> ToyAnswer:
    """The first tokens of the answer to a chat of one user message. Text that is half a letter at the end is U+FFFD."""
    tokenizer = ToyTokenizer()
    before = encode_chat(tokenizer, [Message("user", content)], FORMAT)
    ids: list[int] = []
    for offset in range(1, tokens + 1):
        ids.append(next_id(before + ids, offset, seed))
    return ToyAnswer(ids, tokenizer.decode(ids))
