"""Small random models in Mistral's own layout, and the same weights for transformers."""

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
    "eight_heads": {  # kv heads for eight ranks
        "dim": 64,
        "n_layers": 2,
        "n_heads": 16,
        "n_kv_heads": 8,
        "head_dim": 8,
        "hidden_dim": 96,
        "experts": (8, 2),
        "vocab_size": 160,
    },
    "windowed": {  # as Mistral 7B
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "hidden_dim": 48,
        "sliding_window": 11,
        "vocab_size": 64,
    },
    "dense": {  # as Llama 2
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "hidden_dim": 112,
        "rope_theta": 1e4,
        "vocab_size": 64,
    },
}


def write_checkpoint(folder: Path, shape: str = "grouped", seed: int = 0) -> Path:
    """A params.json and a consolidated.safetensors in float32."""
    params = {**SHAPES[shape], "norm_eps": 1e-5}
    if "experts" in params:
        n_experts, per_token = params.pop("experts")
        params["moe"] = {"num_experts": n_experts, "num_experts_per_tok": per_token}
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
        }
        networks = [f"layers.{i}.feed_forward"]
        if "moe" in params:
            weights[f"{networks[0]}.gate.weight"] = matrix(params["moe"]["num_experts"], dim)
            networks = [f"{networks[0]}.experts.{e}" for e in range(params["moe"]["num_experts"])]
        for network in networks:
            weights |= {
                f"{network}.w1.weight": matrix(hidden, dim),
                f"{network}.w2.weight": matrix(dim, hidden),
                f"{network}.w3.weight": matrix(hidden, dim),
            }
    return weights


def as_transformers(checkpoint: Path, folder: Path) -> Any:
    """The checkpoint as transformers' own model of its kind, by way of a folder in Hugging Face's layout."""
    import transformers

    params = json.loads((checkpoint / "params.json").read_text())
    sizes = {
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "head_dim": params["head_dim"],
        "intermediate_size": params["hidden_dim"],
        "vocab_size": params["vocab_size"],
        "rms_norm_eps": params["norm_eps"],
        "max_position_embeddings": 4096,
    }
    config: Any
    if "moe" in params:
        kind: Any = transformers.MixtralForCausalLM
        experts = {"num_local_experts": params["moe"]["num_experts"], "num_experts_per_tok": params["moe"]["num_experts_per_tok"]}
        config = transformers.MixtralConfig(**sizes, **experts, rope_theta=params.get("rope_theta", 1e6), sliding_window=None)
    elif "sliding_window" in params:
        kind = transformers.MistralForCausalLM
        config = transformers.MistralConfig(**sizes, rope_theta=1e4, sliding_window=params["sliding_window"])
    else:
        kind = transformers.LlamaForCausalLM
        config = transformers.LlamaConfig(**sizes, rope_theta=params["rope_theta"])
    config.save_pretrained(folder)
    is_moe = "moe" in params
    renamed = {huggingface_name(name, is_moe): tensor for name, tensor in load_file(checkpoint / "consolidated.safetensors").items()}
    for name, tensor in renamed.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            renamed[name] = _pairs_to_halves(tensor, params["head_dim"])
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def huggingface_name(name: str, is_moe: bool) -> str:
    whole = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
    if name in whole:
        return whole[name]
    network = (("feed_forward", "block_sparse_moe"),)
    if not is_moe:
        network = (("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w2", "mlp.down_proj"), ("feed_forward.w3", "mlp.up_proj"))
    for ours, theirs in (
        *network,
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
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
