"""Flags and environment to Settings: what is taken as it stands, what is filled in, what is refused with which sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.settings import KEY_VARIABLE, SettingsRefused, parse, parser

SERVER = ["--api_server", "http://box:7777"]
KEY = {KEY_VARIABLE: "mx-key"}


def test_without_flags_it_is_a_terminal_chat_with_the_demo_model() -> None:
    settings = parse([], {})
    assert settings.api_server == ""
    assert settings.ckpt_dir == DEMO_CKPT_DIR
    assert settings.tokenizer_path == DEMO_CKPT_DIR / "tokenizer.model"
    assert (settings.max_batch_size, settings.max_seq_len, settings.dtype, settings.device) == (None, None, "auto", "auto")


def test_every_flag_of_the_aime_article_is_taken(tmp_path: Path) -> None:
    argv = (
        f"--ckpt_dir {tmp_path} --tokenizer_path {tmp_path}/my.model --api_server https://chat.example.org/ --api_auth_key k "
        "--max_batch_size 64 --max_seq_len 4096 --temperature 0.5 --top_p 0.7 --top_k 9 --seed -3"
    ).split()
    settings = parse(argv, {})
    assert (settings.ckpt_dir, settings.tokenizer_path) == (tmp_path, tmp_path / "my.model")
    assert (settings.api_server, settings.api_auth_key) == ("https://chat.example.org", "k")
    assert (settings.max_batch_size, settings.max_seq_len) == (64, 4096)
    assert (settings.temperature, settings.top_p, settings.top_k, settings.seed) == (0.5, 0.7, 9, -3)


def test_a_tokenizer_folder_means_the_tokenizer_in_it(tmp_path: Path) -> None:
    assert parse(["--tokenizer_path", str(tmp_path)], {}).tokenizer_path == tmp_path / "tokenizer.model"


def test_random_weights_take_the_demos_tokenizer_unless_another_is_given(tmp_path: Path) -> None:
    settings = parse(["--ckpt_dir", "random:8x7b"], {})
    assert (str(settings.ckpt_dir), settings.tokenizer_path) == ("random:8x7b", DEMO_CKPT_DIR / "tokenizer.model")
    settings = parse(["--ckpt_dir", "random:8x7b", "--tokenizer_path", str(tmp_path)], {})
    assert settings.tokenizer_path == tmp_path / "tokenizer.model"


def test_the_key_comes_from_the_flag_before_the_environment() -> None:
    assert parse(SERVER, KEY).api_auth_key == "mx-key"
    assert parse([*SERVER, "--api_auth_key", "other"], KEY).api_auth_key == "other"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--api_server", "box:7777"], ["--api_server 'box:7777'", "http://HOST:PORT"]),
        (["--api_server", "ftp://box"], ["ftp://box", "http://HOST:PORT"]),
        (["--api_server", "http://box:port"], ["http://box:port", "http://HOST:PORT"]),
        (["--api_server", "http://user:secret@box"], ["neither a password nor a query", KEY_VARIABLE]),
        (["--ckpt_dir", "/no/such/folder"], ["/no/such/folder", "params.json"]),
        (["--max_batch_size", "0"], ["--max_batch_size", "1 to 4096", "given 0"]),
        (["--max_seq_len", "1"], ["--max_seq_len", "at least 2", "given 1"]),
        (["--temperature", "nan"], ["--temperature", "0 to 2", "given nan"]),
        (["--top_p", "0"], ["--top_p", "above 0", "given 0"]),
        (["--top_k", "-1"], ["--top_k", "0 (all)", "given -1"]),
        (["--seed", str(2**63)], ["--seed", "64-bit", str(2**63)]),
        (["--step_timeout_s", "0"], ["--step_timeout_s", "1 second", "given 0"]),
        (["--endpoint_name", ""], ["--endpoint_name", "1 to 100", "given 0"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--max_batch_size", "many"], ["--max_batch_size", "many"]),
        (["--no_such_flag"], ["--no_such_flag", "--help"]),
        (["--api_serv", "http://box"], ["--api_serv", "--help"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence_with_rule_and_value(argv: list[str], words: list[str]) -> None:
    with pytest.raises(SettingsRefused) as refused:
        parse(argv, KEY)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)


def test_all_ranks_share_one_model_and_each_has_a_slice_of_every_expert_unless_told_otherwise() -> None:
    settings = parse([], {"WORLD_SIZE": "4"})
    assert (settings.tp_size, settings.ep_size, settings.moe_normalization_mode) == (4, 1, None)
    settings = parse(["--tp_size", "4", "--ep_size", "2", "--moe_normalization_mode", "none"], {"WORLD_SIZE": "4"})
    assert (settings.tp_size, settings.ep_size, settings.moe_normalization_mode) == (4, 2, "none")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--tp_size 8", "--tp_size is 8, but torchrun started 4 ranks, and all ranks share one model; run with --nproc_per_node 8"),
        ("--tp_size 0", "--tp_size is 0, but torchrun started 4 ranks, .* leave it out"),
        ("--ep_size 3", r"--ep_size is 3; it must divide the 4 ranks \(tp_size\); give one of 1, 2, 4"),
        ("--ep_size -1", r"--ep_size is -1; it must divide the 4 ranks \(tp_size\); give one of 1, 2, 4"),
        ("--moe_normalization_mode sparse", "sparse.*renorm.*none"),
    ],
)
def test_sizes_that_no_torchrun_can_have_are_refused_with_those_that_work(flags: str, sentence: str) -> None:
    with pytest.raises(SettingsRefused, match=sentence):
        parse(flags.split(), {"WORLD_SIZE": "4"})


def test_a_server_without_a_key_says_where_the_key_is_to_be_had() -> None:
    with pytest.raises(SettingsRefused, match=r"keys\.env") as refused:
        parse(SERVER, {})
    assert KEY_VARIABLE in str(refused.value)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "umlaut-ä"])
def test_a_key_that_no_http_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(SettingsRefused, match="printable ASCII") as refused:
        parse(SERVER, {KEY_VARIABLE: key})
    assert key not in str(refused.value)


def test_help_says_how_to_serve_how_to_chat_and_where_the_key_is() -> None:
    text = parser().format_help()
    for words in ("worker --api_server http://", "chat with the demo model", "keys.env", KEY_VARIABLE, "SIGTERM", "--nproc_per_node"):
        assert words in text
