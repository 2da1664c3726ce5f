"""Small random Mixtrals in Mistral's own layout, and the same weights for transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 8,
        "n_kv_heads": 4,
        "head_dim": 8,
        "hidden_dim": 96,
        "experts": (8, 2),
        "vocab_size": 160,
    },
    "wide_heads": {
        "dim": 48,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 20,
        "hidden_dim": 64,
        "experts": (4, 2),
        "vocab_size": 96,
    },
    "no_groups": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "head_dim": 16,
        "hidden_dim": 40,
        "experts": (6, 3),
        "vocab_size": 64,
    },
}


def write_checkpoint(folder: Path, shape: str = "grouped", seed: int = 0) -> Path:
    """A params.json without rope_theta and a consolidated.safetensors in float32."""
    size = dict(SHAPES[shape])
    n_experts, per_token = size.pop("experts")
    params = {**size, "norm_eps": 1e-5, "moe": {"num_experts": n_experts, "num_experts_per_tok": per_token}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    save_file(_random_weights(params, torch.Generator().manual_seed(seed)), folder / "consolidated.safetensors")
    return folder


def _random_weights(params: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    dim, head_dim, hidden, vocab = params["dim"], params["head_dim"], params["hidden_dim"], params["vocab_size"]
    queries, keys = params["n_heads"] * head_dim, params["n_kv_heads"] * head_dim

    def matrix(rows: int, columns: int) -> Tensor:
        # Wide enough that attention and the router choose sharply: a flat model would hide mistakes.
        return torch.randn(rows, columns, generator=generator) * 2 / columns**0.5

    def norm() -> Tensor:
        return 1 + torch.randn(dim, generator=generator) / 10

    weights = {"tok_embeddings.weight": matrix(vocab, dim) * dim**0.5 / 2, "norm.weight": norm(), "output.weight": matrix(vocab, dim)}
    for i in range(params["n_layers"]):
        weights |= {
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
            f"layers.{i}.attention.wq.weight": matrix(queries, dim),
            f"layers.{i}.attention.wk.weight": matrix(keys, dim),
            f"layers.{i}.attention.wv.weight": matrix(keys, dim),
            f"layers.{i}.attention.wo.weight": matrix(dim, queries),
            f"layers.{i}.feed_forward.gate.weight": matrix(params["moe"]["num_experts"], dim),
        }
        for e in range(params["moe"]["num_experts"]):
            expert = f"layers.{i}.feed_forward.experts.{e}"
            weights |= {
                f"{expert}.w1.weight": matrix(hidden, dim),
                f"{expert}.w2.weight": matrix(dim, hidden),
                f"{expert}.w3.weight": matrix(hidden, dim),
            }
    return weights


def as_transformers(checkpoint: Path, folder: Path) -> Any:
    """The checkpoint as transformers' MixtralForCausalLM, by way of a folder in Hugging Face's layout."""
    from transformers import MixtralConfig, MixtralForCausalLM

    params = json.loads((checkpoint / "params.json").read_text())
    config = MixtralConfig(
        hidden_size=params["dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        head_dim=params["head_dim"],
        intermediate_size=params["hidden_dim"],
        vocab_size=params["vocab_size"],
        num_local_experts=params["moe"]["num_experts"],
        num_experts_per_tok=params["moe"]["num_experts_per_tok"],
        rms_norm_eps=params["norm_eps"],
        rope_theta=1e6,
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(folder)
    renamed = {_huggingface_name(name): tensor for name, tensor in load_file(checkpoint / "consolidated.safetensors").items()}
    for name, tensor in renamed.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            renamed[name] = _pairs_to_halves(tensor, params["head_dim"])
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _huggingface_name(name: str) -> str:
    whole = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
    if name in whole:
        return whole[name]
    for ours, theirs in (
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("feed_forward", "block_sparse_moe"),
        ("attention.wq", "self_attn.q_proj"),
        ("attention.wk", "self_attn.k_proj"),
        ("attention.wv", "self_attn.v_proj"),
        ("attention.wo", "self_attn.o_proj"),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}"


def _pairs_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Mistral's rotary pairs lie side by side, Hugging Face's half a head apart."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()
