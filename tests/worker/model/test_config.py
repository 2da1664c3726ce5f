"""params.json is read as Mistral means it, or refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixtral_worker.model.config import ModelConfig, ModelError

MIXTRAL_8X7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}


def read(folder: Path, params: dict[str, Any]) -> ModelConfig:
    (folder / "params.json").write_text(json.dumps(params))
    return ModelConfig.read(folder)


def test_rope_theta_left_out_means_a_million(tmp_path: Path) -> None:
    assert read(tmp_path, MIXTRAL_8X7B).rope_theta == 1e6
    assert read(tmp_path, MIXTRAL_8X7B | {"rope_theta": 1e4}).rope_theta == 1e4


def test_head_dim_left_out_is_the_even_share(tmp_path: Path) -> None:
    assert read(tmp_path, {name: value for name, value in MIXTRAL_8X7B.items() if name != "head_dim"}).head_dim == 128


def test_mixtral_8x7b_keeps_128_kib_of_keys_and_values_per_token(tmp_path: Path) -> None:
    assert read(tmp_path, MIXTRAL_8X7B).kv_bytes_per_token(2) == 128 * 1024


def test_mixtral_8x7b_splits_over_1_2_4_or_8_ranks(tmp_path: Path) -> None:
    config = read(tmp_path, MIXTRAL_8X7B)
    assert config.possible_ranks == [1, 2, 4, 8]
    config.require_ranks(4)
    with pytest.raises(ModelError, match=r"torchrun started 3 ranks; 8 kv heads allow 1, 2, 4 or 8; run with --nproc_per_node 8"):
        config.require_ranks(3)


def test_ranks_must_also_share_vocabulary_and_experts_evenly(tmp_path: Path) -> None:
    config = read(tmp_path, MIXTRAL_8X7B)
    assert replace(config, vocab_size=32002).possible_ranks == [1, 2]
    assert replace(config, hidden_dim=14337).possible_ranks == [1]
    with pytest.raises(ModelError, match="allow 1; run with --nproc_per_node 1"):
        replace(config, hidden_dim=14337).require_ranks(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": None}, "does not describe a Mixtral"),
        ({"moe": {"num_experts": 8}}, "num_experts_per_tok"),
        ({"dim": "wide"}, "wide"),
        ({"n_kv_heads": 5}, "32 heads cannot be shared evenly by 5 kv heads"),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "3 experts per token of 2 experts"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
    ],
)
def test_shape_that_is_no_mixtral_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as refusal:
        read(tmp_path, MIXTRAL_8X7B | change)
    assert str(tmp_path / "params.json") in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_file_that_is_no_json_object_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(ModelError, match=r"params\.json"):
        ModelConfig.read(tmp_path)
