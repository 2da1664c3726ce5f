"""A program that loads checkpoints, one after another, and says how much memory of its own each took at most.

python -m support.peak_memory FOLDER …  →  {FOLDER: {"weights": bytes, "largest": bytes of its largest tensor, "peak": bytes}, …}

A folder with AS_A_SHARE behind it is read as one rank of four does, the experts shared out over two groups.

Run it with ENVIRONMENT. Counted is anonymous memory: a mapped file's pages are the kernel's cache, dropped when memory is short.
"""

import gc
import json
import sys
from pathlib import Path
from threading import Event, Thread

import torch
from safetensors.torch import save_file

from mixtral_worker.model import checkpoint
from mixtral_worker.model.config import NAMES_OF_HUGGINGFACE, ModelConfig
from mixtral_worker.model.parallel import Shard
from mixtral_worker.model.transformer import Transformer
from support.checkpoint_layouts import stacked, write_meta
from support.small_mixtral import huggingface_name

LAYOUTS = ("mistral", "first_release", "meta", "huggingface", "random")
SHAPE = "random:dim=512,n_heads=8,n_kv_heads=4,head_dim=64,hidden_dim=1024,vocab_size=4096,rope_theta=1e6"
MOE, DENSE = f"{SHAPE},n_layers=2", f"{SHAPE},n_layers=7,n_experts=1,experts_per_token=1"  # 121 MB and 82 MB in tensors of at most 8.4
FIRST = "random:dim=64,n_layers=1,hidden_dim=64,vocab_size=64"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc would keep freed tensors for the next ones
AS_A_SHARE = "@share"
SHARED_LAYOUTS = ("mistral", "first_release", "huggingface", "random")  # those with experts
SAMPLE_EVERY_S = 0.0005


def write_large(layout: str, folder: Path) -> Path:
    """Random weights in a layout; those named random need no folder."""
    spec = Path(DENSE if layout == "meta" else MOE)
    if layout == "random":
        return spec
    config, model = empty_model(spec)
    model.to_empty(device="cpu")
    checkpoint.load(model, spec)
    weights = {part.name: part.place.contiguous() for part in checkpoint.parts(model)}
    params = {name: getattr(config, name) for name in NAMES_OF_HUGGINGFACE if getattr(config, name)}
    experts = {"num_experts": config.n_experts, "num_experts_per_tok": config.experts_per_token}
    folder.mkdir()
    if layout == "huggingface":
        renamed = {NAMES_OF_HUGGINGFACE[name]: number for name, number in params.items()}
        description = {**renamed, **experts, "model_type": "mixtral", "num_local_experts": config.n_experts}
        (folder / "config.json").write_text(json.dumps(description))
        save_file({huggingface_name(name, is_moe=True): tensor for name, tensor in weights.items()}, folder / "model.safetensors")
        return folder
    (folder / "params.json").write_text(json.dumps({**params, "moe": experts if config.is_moe else None}))
    if layout == "meta":
        write_meta(weights, folder, 2)
    elif layout == "first_release":
        torch.save(stacked(weights, config.n_layers, config.n_experts), folder / "consolidated.00.pth")
    else:
        save_file(weights, folder / "consolidated.safetensors")
    return folder


def empty_model(ckpt_dir: Path, shard: Shard | None = None) -> tuple[ModelConfig, Transformer]:
    config = ModelConfig.read(ckpt_dir)
    with torch.device("meta"):
        return config, Transformer(config, shard or Shard())


def own_bytes() -> int:
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("RssAnon:")) * 1024


def measure(name: str) -> dict[str, int]:
    gc.collect()  # or the model before this one would leave while this one comes
    ckpt_dir = Path(name.removesuffix(AS_A_SHARE))
    _, model = empty_model(ckpt_dir, Shard(3, 4, ep_size=2) if name.endswith(AS_A_SHARE) else None)
    before = peak = own_bytes()
    is_loaded = Event()

    def sample(*_: object) -> None:
        nonlocal peak
        peak = max(peak, own_bytes())

    def watch() -> None:
        while not is_loaded.wait(SAMPLE_EVERY_S):
            sample()

    watcher = Thread(target=watch)
    watcher.start()
    model.to_empty(device="cpu")
    checkpoint.load(model, ckpt_dir, sample)
    is_loaded.set()
    watcher.join()
    sizes = [part.place.nbytes for part in checkpoint.parts(model)]
    return {"weights": sum(sizes), "largest": max(sizes), "peak": peak - before}


if __name__ == "__main__":
    measure(FIRST)  # what torch sets up at its first use is not ours to count
    print(json.dumps({name: measure(name) for name in sys.argv[1:]}))
