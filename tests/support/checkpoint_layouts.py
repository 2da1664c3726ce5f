"""The small models of small_mixtral.py in the other layouts that checkpoints come in."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from support.small_mixtral import as_transformers

LAYOUTS = {
    "grouped.first_release": "grouped",
    "no_groups.spread": "no_groups",
    "grouped.huggingface": "grouped",
    "wide_heads.older_huggingface": "wide_heads",
    "windowed.huggingface": "windowed",
    "dense.huggingface": "dense",
    "dense.meta": "dense",
    "windowed.torch": "windowed",
}
"""Name of a folder → the model whose weights it holds."""

SPLIT_BY_COLUMNS = ("tok_embeddings.weight", "wo.weight", "w2.weight")


def write_layout(name: str, root: Path) -> Path:
    """Write root / name from the model that lies beside it."""
    model, layout = name.split(".")
    folder = root / name
    folder.mkdir()
    if layout.endswith("huggingface"):
        write_huggingface(root / model, folder)
        if layout.startswith("older"):
            _as_before_rope_parameters(folder / "config.json")
        return folder
    params = json.loads((root / model / "params.json").read_text())
    weights = load_file(root / model / "consolidated.safetensors")
    if layout == "meta":
        params = {key: params[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")}
        params |= {"multiple_of": 16, "ffn_dim_multiplier": 1.3}
        write_meta(weights, folder, 4)
    elif layout == "torch":
        torch.save(weights, folder / "consolidated.00.pth")
    else:
        weights = stacked(weights, params["n_layers"], params["moe"]["num_experts"])
        names = sorted(weights)
        for i in range(1 if layout == "first_release" else 3):
            step = 1 if layout == "first_release" else 3
            torch.save({name: weights[name] for name in names[i::step]}, folder / f"consolidated.{i:02}.{'pth' if step == 1 else 'pt'}")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def stacked(weights: dict[str, Tensor], n_layers: int, n_experts: int) -> dict[str, Tensor]:
    """As 8x7B was first released: a layer's experts one below the other, w2 transposed."""
    out = {name.replace("feed_forward", "block_sparse_moe"): tensor for name, tensor in weights.items() if ".experts." not in name}
    for i in range(n_layers):
        for weight in ("w1", "w2", "w3"):
            experts = [weights[f"layers.{i}.feed_forward.experts.{e}.{weight}.weight"] for e in range(n_experts)]
            out[f"layers.{i}.block_sparse_moe.{weight}"] = torch.cat([expert.t() if weight == "w2" else expert for expert in experts])
    return out


def write_meta(weights: dict[str, Tensor], folder: Path, count: int) -> None:
    """As Llama 2 was released: every file holds its rank's piece of every matrix, and a copy of the rest."""
    for rank in range(count):
        pieces = {
            name: tensor if tensor.dim() == 1 else tensor.chunk(count, 1 if name.endswith(SPLIT_BY_COLUMNS) else 0)[rank].clone()
            for name, tensor in weights.items()
        }
        torch.save({**pieces, "rope.freqs": torch.ones(4)}, folder / f"consolidated.{rank:02}.pth")


def write_huggingface(checkpoint: Path, folder: Path) -> None:
    """As transformers itself saves the model, in several files."""
    as_transformers(checkpoint, folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def _as_before_rope_parameters(path: Path) -> None:
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(config))
