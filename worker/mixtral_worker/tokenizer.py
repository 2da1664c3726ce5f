"""Text to token ids and back: the only door to sentencepiece.

Decides how text maps to ids losslessly (every character of the text comes back, byte for byte) and what bytes an id stands for.
Leaves to prompt.py which ids stand around a message, and to detokenizer.py how a stream of ids becomes a stream of text.

SentencePiece writes a blank as U+2581 and puts one in front of every text; `decode` takes that one away again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

BLANK = "\u2581"


class TokenizerError(ValueError):
    """tokenizer file cannot be used; the message names the file and what to do"""


@dataclass(frozen=True)
class VocabularyPiece:
    """One id as SentencePiece's file has it. kind: NORMAL, BYTE, CONTROL or UNKNOWN."""

    text: str
    score: float
    kind: str


class Tokenizer:
    """A SentencePiece vocabulary with byte fallback. Control ids (BOS, EOS, template marks) never come out of text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces = _load(path)
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self._bytes = [_piece_bytes(self._pieces, id) for id in range(self.vocab_size)]
        self._byte_ids = _byte_ids(self._pieces, path)
        self._control_ids = {self._pieces.id_to_piece(id): id for id in range(self.vocab_size) if self._pieces.is_control(id)}

    def encode(self, text: str, leading_blank: bool = True) -> list[int]:
        """Ids of the text alone, no BOS or EOS. leading_blank=False leaves out SentencePiece's blank in front: for text after a newline."""
        first, *rest = text.split(BLANK)
        ids: list[int] = self._pieces.encode(first) if leading_blank else self._encode_continuing(first)
        if leading_blank and rest and not first:
            ids = self.bytes_to_ids(b" ")
        for part in rest:  # a U+2581 of the text's own would come back as a blank, so it goes in as its three bytes
            ids += self.bytes_to_ids(BLANK.encode()) + self._encode_continuing(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without the one blank in front; control ids give nothing, bytes that are no UTF-8 give U+FFFD."""
        return b"".join(self._bytes[id] for id in ids).removeprefix(b" ").decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Bytes that this id adds to the text: a piece's UTF-8 with blanks as blanks, a byte piece's byte, b"" for control ids."""
        return self._bytes[id]

    def bytes_to_ids(self, text_bytes: bytes) -> list[int]:
        """Byte-fallback ids: other ids for the same text."""
        return [self._byte_ids[byte] for byte in text_bytes]

    def piece(self, id: int) -> str:
        """What the vocabulary calls this id: "</s>" for a control id."""
        return str(self._pieces.id_to_piece(id))

    def is_byte(self, id: int) -> bool:
        return bool(self._pieces.is_byte(id))

    def control_id(self, piece: str) -> int | None:
        """Id of a control piece such as "[INST]", or None where the vocabulary has it only as ordinary text or not at all."""
        return self._control_ids.get(piece)

    @property
    def control_pieces(self) -> Mapping[str, int]:
        """Every control piece and its id."""
        return self._control_ids

    def vocabulary_piece(self, id: int) -> VocabularyPiece:
        pieces = self._pieces
        kind = "CONTROL" if pieces.is_control(id) else "BYTE" if pieces.is_byte(id) else "UNKNOWN" if pieces.is_unknown(id) else "NORMAL"
        return VocabularyPiece(pieces.id_to_piece(id), pieces.get_score(id), kind)

    def _encode_continuing(self, text: str) -> list[int]:
        # A newline is a byte piece that merges with nothing: blank, newline, then the text as it is in mid-sentence.
        ids: list[int] = self._pieces.encode("\n" + text)
        return ids[2:]


def train_vocabulary(lines: Iterable[str], path: Path, vocab_size: int, control_pieces: Sequence[str]) -> None:
    """Write a BPE vocabulary of these lines, built as Mistral's are: bytes for what has no piece, text left as it is, BOS 1, EOS 2."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            control_symbols=list(control_pieces),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    if not path.is_file():
        raise TokenizerError(f"no tokenizer file at {path}; put the checkpoint's tokenizer.model there")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"{path} ({path.stat().st_size} bytes) is not a SentencePiece model; copy the checkpoint's tokenizer.model again"
        ) from error


def _piece_bytes(pieces: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    if pieces.is_control(id) or pieces.is_unknown(id):
        return b""
    piece: str = pieces.id_to_piece(id)
    if pieces.is_byte(id):  # written as <0x0A>
        return bytes([int(piece[3:5], 16)])
    return piece.replace(BLANK, " ").encode()


def _byte_ids(pieces: sentencepiece.SentencePieceProcessor, path: Path) -> list[int]:
    ids = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    if not all(pieces.is_byte(id) for id in ids):
        raise TokenizerError(f"{path} has no byte-fallback pieces, so it cannot hold every text; use a Mistral tokenizer.model")
    return ids
