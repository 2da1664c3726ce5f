"""What other programs read is the same model: the same weights, the same prompt ids, the same greedy answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.export import OK, REFUSED, chat_template, huggingface_weights, main, read_model
from mixtral_worker.prompt import Message, encode_chat
from mixtral_worker.tokenizer import Tokenizer

CHATS = (
    [("user", "Tell a long story: Once upon a time")],
    [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi there"), ("user", "Bye")],
    [("user", "Ünïcode: 木 🙂"), ("assistant", "Yes."), ("user", "two  blanks\nand lines")],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "hf"
    assert main(["--format", "huggingface", "--out", str(out)]) == OK
    return out


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer(DEMO_CKPT_DIR / "tokenizer.model")


def ours(tokenizer: Tokenizer, chat: list[tuple[str, str]]) -> list[int]:
    return encode_chat(tokenizer, [Message(*message) for message in chat], "instruct")


def theirs(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def test_transformers_reads_every_weight_and_answers_alike(folder: Path, demo: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt = ours(demo, CHATS[0])
    said = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)[0, len(prompt) :].tolist()
    assert demo.decode(said).startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize("chat", CHATS)
def test_transformers_makes_the_same_prompt_ids(folder: Path, demo: Tokenizer, chat: list[tuple[str, str]]) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(theirs(chat), tokenize=True, return_dict=False) == ours(demo, chat)


def test_our_own_reader_reads_the_folder_back_to_the_bit(folder: Path) -> None:
    before, after = (dict(huggingface_weights(read_model(path, torch.float32))) for path in (DEMO_CKPT_DIR, folder))
    assert before.keys() == load_file(folder / "model.safetensors").keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gguf_holds_weights_vocabulary_and_template(tmp_path: Path, demo: Tokenizer) -> None:
    import gguf

    out = tmp_path / "demo.gguf"
    assert main(["--format", "gguf", "--out", str(out)]) == OK
    file = gguf.GGUFReader(out)
    model = read_model(DEMO_CKPT_DIR, torch.float32)
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    assert len(tensors) == 3 + model.config.n_layers * 10
    assert torch.equal(torch.from_numpy(tensors["token_embd.weight"].copy()), model.embedding)
    field = file.fields["tokenizer.ggml.tokens"]
    assert [bytes(field.parts[i]).decode() for i in field.data] == [demo.vocabulary_piece(id).text for id in range(demo.vocab_size)]
    template = file.fields["tokenizer.chat_template"]
    assert bytes(template.parts[template.data[0]]).decode() == chat_template(demo, "instruct", adds_blanks=True)


def test_path_that_exists_or_cannot_be_is_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, sentence in ((tmp_path, "exists already"), (tmp_path / "no" / "out", "does not exist; make it first")):
        assert main(["--format", "huggingface", "--out", str(out), "--ckpt_dir", str(tmp_path / "nowhere")]) == REFUSED
        assert sentence in capsys.readouterr().err


def test_checkpoint_that_cannot_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "huggingface", "--out", str(tmp_path / "out"), "--ckpt_dir", str(tmp_path)]) == REFUSED
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
