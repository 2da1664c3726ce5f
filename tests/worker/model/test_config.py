"""params.json is read as Mistral or Meta means it, config.json as transformers does, random:… as it says; or refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.model.config import SHAPES, ModelConfig, ModelError

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
    with pytest.raises(ModelError, match=r"torchrun started 3 ranks; 8 kv heads, .* allow 1, 2, 4 or 8; run with --nproc_per_node 8"):
        config.require_ranks(3)


@pytest.mark.parametrize(
    ("tp_size", "ep_size", "allowed"), [(1, 2, "1"), (2, 4, "1 or 2"), (4, 3, "1, 2 or 4"), (8, 16, "1, 2, 4 or 8"), (8, 0, "1, 2, 4 or 8")]
)
def test_experts_are_shared_out_only_over_groups_that_divide_ranks_and_experts(tp_size: int, ep_size: int, allowed: str) -> None:
    for size in SHAPES["8x7b"].possible_ep_sizes(tp_size):
        SHAPES["8x7b"].require_ranks(tp_size, size)
    sentence = rf"ep_size is {ep_size}; {tp_size} ranks, 8 experts and a hidden size of 14,336 allow {allowed}: .* run with --ep_size 1"
    with pytest.raises(ModelError, match=sentence):
        SHAPES["8x7b"].require_ranks(tp_size, ep_size)


def test_slices_of_an_expert_must_be_even(tmp_path: Path) -> None:
    config = replace(SHAPES["8x7b"], hidden_dim=14338)
    config.require_ranks(8, 4)
    with pytest.raises(ModelError, match=r"8 ranks, 8 experts and a hidden size of 14,338 allow 4 or 8: .* run with --ep_size 4"):
        config.require_ranks(8, 2)


def test_dense_model_has_no_experts_to_share_out() -> None:
    with pytest.raises(ModelError, match=r"a dense model, which is one expert, and .* allow 1"):
        SHAPES["mistral7b"].require_ranks(2, 2)


def test_normalization_is_renorm_unless_params_say_otherwise(tmp_path: Path) -> None:
    assert read(tmp_path, MIXTRAL_8X7B).moe_normalization_mode == "renorm"
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "normalization_mode": "none"}
    assert read(tmp_path, MIXTRAL_8X7B | {"moe": moe}).moe_normalization_mode == "none"
    with pytest.raises(ModelError, match="moe_normalization_mode is 'sparse_mixer', which is none of renorm, none"):
        read(tmp_path, MIXTRAL_8X7B | {"moe": moe | {"normalization_mode": "sparse_mixer"}})
    assert ModelConfig.read(Path("random:8x7b,moe_normalization_mode=none")).moe_normalization_mode == "none"


def test_ranks_must_also_share_vocabulary_and_experts_evenly(tmp_path: Path) -> None:
    config = read(tmp_path, MIXTRAL_8X7B)
    assert replace(config, vocab_size=32002).possible_ranks == [1, 2]
    assert replace(config, hidden_dim=14337).possible_ranks == [1]
    with pytest.raises(ModelError, match="a hidden size of 14,337 allow 2: "):
        replace(config, hidden_dim=14337).require_ranks(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": 8}, "does not describe a Mixtral"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"yarn": {"factor": 4}}, "yarn is .*'factor': 4.*, which this worker does not compute"),
        ({"quantization": {"qformat_weight": "fp8"}}, "quantization is"),
        ({"moe": {"num_experts": 8}}, "num_experts_per_tok"),
        ({"dim": "wide"}, "wide"),
        ({"n_kv_heads": 5}, "32 heads cannot be shared evenly by 5 kv heads"),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "3 experts per token of 2 experts"),
        ({"sliding_window": -1}, "sliding_window is -1"),
    ],
)
def test_shape_that_is_no_mixtral_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as refusal:
        read(tmp_path, MIXTRAL_8X7B | change)
    assert str(tmp_path / "params.json") in str(refusal.value)


MISTRAL_7B = {name: value for name, value in MIXTRAL_8X7B.items() if name != "moe"} | {"sliding_window": 4096}
LLAMA_2_70B = {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
LLAMA_2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}


def test_known_models_have_the_shapes_that_random_weights_can_be_asked_for(tmp_path: Path) -> None:
    assert read(tmp_path, MIXTRAL_8X7B) == SHAPES["8x7b"]
    assert read(tmp_path, MISTRAL_7B) == SHAPES["mistral7b"]
    assert read(tmp_path, LLAMA_2_70B) == SHAPES["llama2-70b"]
    assert not SHAPES["mistral7b"].is_moe
    assert SHAPES["8x22b"].is_moe


def test_dense_model_of_mistral_without_a_window_turns_by_a_million(tmp_path: Path) -> None:
    config = read(tmp_path, MISTRAL_7B | {"sliding_window": None})
    assert (config.sliding_window, config.rope_theta, config.n_experts) == (None, 1e6, 1)


def test_model_of_meta_has_a_hidden_size_by_its_formula_and_a_kv_head_per_head_where_it_names_none(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA_2_7B)
    assert (config.hidden_dim, config.n_kv_heads, config.head_dim, config.rope_theta) == (11008, 32, 128, 1e4)


HUGGINGFACE_8X7B = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def read_huggingface(folder: Path, config: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig.read(folder)


def test_config_of_huggingface_means_what_params_mean(tmp_path: Path) -> None:
    assert read_huggingface(tmp_path, HUGGINGFACE_8X7B) == SHAPES["8x7b"]


@pytest.mark.parametrize(
    "theta", [{"rope_theta": 2e4}, {"rope_theta": None, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}]
)
def test_rope_theta_of_huggingface_is_read_from_either_place(theta: dict[str, Any], tmp_path: Path) -> None:
    assert read_huggingface(tmp_path, HUGGINGFACE_8X7B | theta).rope_theta == 2e4


@pytest.mark.parametrize(("kind", "window"), [("mixtral", None), ("mistral", 4096), ("llama", None)])
def test_window_and_theta_left_out_are_those_of_transformers(kind: str, window: int | None, tmp_path: Path) -> None:
    from transformers import AutoConfig

    silent = {name: value for name, value in HUGGINGFACE_8X7B.items() if name not in ("sliding_window", "rope_theta")}
    config = read_huggingface(tmp_path, silent | {"model_type": kind})
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert config.sliding_window == window == getattr(theirs, "sliding_window", None)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]


def test_window_of_a_llama_is_left_out_as_transformers_does(tmp_path: Path) -> None:
    assert read_huggingface(tmp_path, HUGGINGFACE_8X7B | {"model_type": "llama", "sliding_window": 4096}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; this worker runs mixtral, mistral and llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type is 'yarn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_local_experts": None}, "config.json"),
    ],
)
def test_config_of_another_architecture_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as refusal:
        read_huggingface(tmp_path, HUGGINGFACE_8X7B | change)
    assert str(tmp_path / "config.json") in str(refusal.value)


def test_random_shape_is_a_known_one_with_changes() -> None:
    assert ModelConfig.read(Path("random:8x22b")) == SHAPES["8x22b"]
    assert ModelConfig.read(Path("random:8x7B,n_layers=2")) == replace(SHAPES["8x7b"], n_layers=2)
    demo = ModelConfig.read(DEMO_CKPT_DIR)
    assert ModelConfig.read(Path("random:demo")) == demo
    changed = replace(demo, dim=64, n_layers=2, norm_eps=1e-6, sliding_window=32)
    assert ModelConfig.read(Path("random:dim=64,n_layers=2,norm_eps=1e-6,sliding_window=32")) == changed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "names no shape; give one of 8x7b, 8x22b, mistral7b, llama2-70b, demo"),
        ("9x9b", "random:9x9b names no shape"),
        ("width=3", "'width' is none of dim, n_layers"),
        ("dim=wide", "random:dim=wide is no shape: .*'wide'"),
        ("8x7b,n_kv_heads=5", "32 heads cannot be shared evenly by 5 kv heads"),
        ("dim=0", "dim is 0"),
        ("8x7b,", "'' is none of"),
    ],
)
def test_random_shape_that_is_none_is_refused_by_name(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.read(Path(f"random:{spec}"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_file_that_is_no_json_object_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(ModelError, match=r"params\.json"):
        ModelConfig.read(tmp_path)
