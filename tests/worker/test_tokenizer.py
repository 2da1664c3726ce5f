"""Every text comes back byte for byte, and no text becomes a control id."""

from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixtral_worker.tokenizer import Tokenizer, TokenizerError
from support import tokenizers

UNTIMED = settings(deadline=None)
NAMES = ["v1", "v3", "demo"]
TEXTS = st.lists(
    st.sampled_from(["</s>", "<s>", "[INST]", "<0x41>", "\u2581", " ", "\n", "\0", "\r\n", "é", "😀", "a"]) | st.text(), max_size=12
).map("".join)


@cache
def sentencepieces_own(name: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizers.PATHS[name]))


def text_bytes(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids))


@pytest.mark.parametrize("name", NAMES)
@UNTIMED
@given(text=TEXTS)
@example(text="  two  blanks  ")
@example(text="\u2581\u2581 x\u2581")
def test_every_text_comes_back_byte_for_byte(name: str, text: str) -> None:
    tokenizer = tokenizers.load(name)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert text_bytes(tokenizer, tokenizer.encode(text)) == (b" " + text.encode() if text else b"")
    assert text_bytes(tokenizer, tokenizer.encode(text, leading_blank=False)) == text.encode()


@pytest.mark.parametrize("name", NAMES)
@UNTIMED
@given(text=TEXTS)
def test_no_text_becomes_a_control_id(name: str, text: str) -> None:
    tokenizer = tokenizers.load(name)
    assert all(tokenizer.token_bytes(id) for id in tokenizer.encode(text) + tokenizer.encode(text, leading_blank=False))


@pytest.mark.parametrize("name", NAMES)
@UNTIMED
@given(text=TEXTS)
def test_ids_are_sentencepieces_own_wherever_those_are_lossless(name: str, text: str) -> None:
    text = text.replace("\u2581", "")  # SentencePiece itself gives it back as a blank
    assert tokenizers.load(name).encode(text) == sentencepieces_own(name).encode(text)


@pytest.mark.parametrize("name", NAMES)
def test_control_ids_have_no_text_and_bytes_are_bytes(name: str) -> None:
    tokenizer = tokenizers.load(name)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.control_id("<s>") == 1
    assert tokenizer.control_id("</s>") == 2
    assert tokenizer.token_bytes(tokenizer.bos_id) == tokenizer.token_bytes(tokenizer.eos_id) == b""
    assert text_bytes(tokenizer, tokenizer.bytes_to_ids(bytes(range(256)))) == bytes(range(256))
    assert all(map(tokenizer.is_byte, tokenizer.bytes_to_ids(bytes(range(256)))))
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 2]) == "a b"


def test_template_marks_are_control_ids_only_where_the_vocabulary_has_them() -> None:
    marks = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert [tokenizers.load("v1").control_id(mark) for mark in marks] == [None] * 4
    assert [tokenizers.load("v3").control_id(mark) for mark in marks] == [3, 4, None, None]
    assert [tokenizers.load("demo").control_id(mark) for mark in marks] == [3, 4, 5, 6]
    assert [tokenizers.load(name).vocab_size for name in NAMES] == [32000, 32768, 4096]


def test_bos_written_as_text_is_three_ordinary_pieces() -> None:
    assert tokenizers.load("v1").encode("<s>") == [523, 28713, 28767]


def test_bytes_that_are_no_text_decode_as_replacement_characters() -> None:
    tokenizer = tokenizers.load("demo")
    assert tokenizer.decode(tokenizer.bytes_to_ids(b"a\xe2(\xff")) == "a\ufffd(\ufffd"


def test_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer file at .*gone\.model; put the checkpoint's tokenizer\.model there"):
        Tokenizer(tmp_path / "gone.model")


def test_broken_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model \(43 bytes\) is not a SentencePiece model; copy"):
        Tokenizer(broken)


def test_empty_file_is_broken_too(tmp_path: Path) -> None:
    empty = tmp_path / "tokenizer.model"
    empty.touch()
    with pytest.raises(TokenizerError, match=r"\(0 bytes\) is not a SentencePiece model"):
        Tokenizer(empty)


def test_vocabulary_without_byte_pieces_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "lossy.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a bird sang", "a dog ran"] * 20), model_writer=file, vocab_size=20, model_type="bpe", minloglevel=2
        )
    with pytest.raises(TokenizerError, match=r"lossy\.model has no byte-fallback pieces"):
        Tokenizer(tmp_path / "lossy.model")
