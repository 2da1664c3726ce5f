"""Fill a Transformer from Mistral's consolidated safetensors, each rank reading its own slices.

Every slice goes from the mapped file straight to its place on the device; at no time are there two copies of the weights.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixtral_worker.model.config import ModelError
from mixtral_worker.model.transformer import Transformer

Progress = Callable[[int, int], None]  # bytes filled, bytes in all, on this rank


@dataclass(frozen=True)
class Part:
    """A tensor of the file and the place of this rank's share of it."""

    name: str
    place: Tensor
    split_dim: int | None = None  # the dimension cut over the ranks; None: every rank holds the whole


def parts(model: Transformer) -> Iterator[Part]:
    """Every tensor of Mistral's layout and where it belongs."""
    config = model.config
    yield Part("tok_embeddings.weight", model.embedding)
    yield Part("norm.weight", model.norm.weight)
    yield Part("output.weight", model.head.weight, 0)
    layers: Iterable[Any] = model.layers
    for i, layer in enumerate(layers):
        prefix = f"layers.{i}"
        yield Part(f"{prefix}.attention_norm.weight", layer.attention_norm.weight)
        yield Part(f"{prefix}.ffn_norm.weight", layer.ffn_norm.weight)
        rows = [n * config.head_dim // model.shard.count for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        for name, place in zip(("wq", "wk", "wv"), layer.attention.wqkv.weight.split(rows), strict=True):
            yield Part(f"{prefix}.attention.{name}.weight", place, 0)
        yield Part(f"{prefix}.attention.wo.weight", layer.attention.wo.weight, 1)
        yield Part(f"{prefix}.feed_forward.gate.weight", layer.moe.gate)
        for e in range(config.n_experts):
            w1, w3 = layer.moe.w13[e].chunk(2)
            yield Part(f"{prefix}.feed_forward.experts.{e}.w1.weight", w1, 0)
            yield Part(f"{prefix}.feed_forward.experts.{e}.w3.weight", w3, 0)
            yield Part(f"{prefix}.feed_forward.experts.{e}.w2.weight", layer.moe.w2[e], 1)


def load(model: Transformer, ckpt_dir: Path, progress: Progress | None = None) -> None:
    """Fill the model's weights, converting to its dtype. Raises ModelError naming file, tensor, expected and found."""
    files = _open_all(ckpt_dir, model.embedding.device)
    total = sum(part.place.nbytes for part in parts(model))
    filled = 0
    for part in parts(model):
        if part.name not in files:
            raise ModelError(
                f"{ckpt_dir} lacks the tensor {part.name}; {len(files)} tensors found; is it a Mixtral in Mistral's own layout?"
            )
        _fill(part, *files[part.name], model.shard.index, model.shard.count)
        filled += part.place.nbytes
        if progress:
            progress(filled, total)


def _open_all(ckpt_dir: Path, device: Any) -> dict[str, tuple[Path, Any]]:
    """Which file holds which tensor."""
    paths = sorted(ckpt_dir.glob("consolidated*.safetensors"))
    if not paths:
        raise ModelError(f"{ckpt_dir} holds no consolidated.safetensors; give ckpt_dir a checkpoint in Mistral's own layout")
    files: dict[str, tuple[Path, Any]] = {}
    for path in paths:
        try:
            file: Any = safe_open(path, framework="pt", device=str(device))
        except SafetensorError as error:
            found = f"{path.stat().st_size:,} bytes"
            raise ModelError(f"{path} cannot be read as safetensors ({error}); {found} found; fetch the file again") from error
        for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
            if name in files:
                raise ModelError(f"the tensor {name} stands in both {files[name][0]} and {path}; keep one of the files")
            files[name] = path, file
    return files


def _fill(part: Part, path: Path, file: Any, index: int, count: int) -> None:
    source = file.get_slice(part.name)
    share = list(part.place.shape)
    expected, found = share.copy(), list(source.get_shape())
    cut = [slice(None)] * len(share)
    if part.split_dim is not None:
        size = share[part.split_dim]
        expected[part.split_dim] *= count
        cut[part.split_dim] = slice(index * size, (index + 1) * size)
    if found != expected:
        raise ModelError(f"{path}: {part.name} has shape {found}; params.json makes it {expected}; do the two belong together?")
    part.place.copy_(source[tuple(cut)])
