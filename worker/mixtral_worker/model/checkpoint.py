"""Fill a Transformer with a checkpoint, or with random numbers in its place, each rank reading its own slices.

Decides which tensor belongs into which weight, and that nothing is missing, left over or of another shape before the first is read. Each
slice goes from the mapped file to its place on the device; at no time are there two copies of the weights. files.py opens what the folder
holds, layouts.py knows how each layout names and turns a tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral_worker.model import files, layouts, random_weights
from mixtral_worker.model.config import ModelConfig, ModelError, is_huggingface
from mixtral_worker.model.files import Stored
from mixtral_worker.model.layouts import Location
from mixtral_worker.model.parallel import Shard
from mixtral_worker.model.transformer import FeedForward, Transformer
from mixtral_worker.settings import RANDOM

Progress = Callable[[int, int], None]  # bytes filled, bytes in all, on this rank
WITHOUT_PLACE = ("rope.freqs", "rotary_emb.inv_freq")  # computed here


@dataclass(frozen=True)
class Part:
    """A tensor, by its name in Mistral's layout, and the place of this rank's share of it."""

    name: str
    place: Tensor
    index: int = 0  # which share it is, counted along the dimension in which the place is smaller than the whole

    def share(self, whole: Sequence[int]) -> list[range]:
        firsts = [self.index * size if size < full else 0 for size, full in zip(self.place.shape, whole, strict=True)]
        return [range(first, first + size) for first, size in zip(firsts, self.place.shape, strict=True)]


@dataclass(frozen=True)
class Source:
    """A whole tensor in the folder's files."""

    stored: Stored
    location: Location
    shape: list[int]  # there


def load(model: Transformer, ckpt_dir: Path, progress: Progress | None = None) -> None:
    """Fill the model's weights, converting to its dtype. Raises ModelError naming file, tensor, expected and found."""
    wanted, shapes = list(parts(model)), whole_shapes(model.config)
    is_random = str(ckpt_dir).startswith(RANDOM)
    readings = [_random(part, shapes[part.name]) for part in wanted] if is_random else _located(model, ckpt_dir, wanted, shapes)
    total = sum(part.place.nbytes for part in wanted)
    filled = 0
    for part, read_into in zip(wanted, readings, strict=True):
        read_into(part.place)
        filled += part.place.nbytes
        if progress:
            progress(filled, total)


def whole_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Every tensor of the model over all ranks."""
    with torch.device("meta"):  # shapes alone
        return {part.name: list(part.place.shape) for part in parts(Transformer(config, Shard()))}


def parts(model: Transformer) -> Iterator[Part]:
    """Every tensor that this rank holds a share of, and where it belongs."""
    config, shard = model.config, model.shard
    yield Part("tok_embeddings.weight", model.embedding)
    yield Part("norm.weight", model.norm.weight)
    yield Part("output.weight", model.head.weight, shard.index)
    layers: Iterable[Any] = model.layers
    for i, layer in enumerate(layers):
        prefix = f"layers.{i}"
        yield Part(f"{prefix}.attention_norm.weight", layer.attention_norm.weight)
        yield Part(f"{prefix}.ffn_norm.weight", layer.ffn_norm.weight)
        rows = [n * config.head_dim // shard.count for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        for name, place in zip(("wq", "wk", "wv"), layer.attention.wqkv.weight.split(rows), strict=True):
            yield Part(f"{prefix}.attention.{name}.weight", place, shard.index)
        yield Part(f"{prefix}.attention.wo.weight", layer.attention.wo.weight, shard.index)
        ffn = layer.feed_forward
        if isinstance(ffn, FeedForward):
            yield from _ffn_parts(f"{prefix}.feed_forward", ffn.w13.weight, ffn.w2.weight, shard.index)
            continue
        yield Part(f"{prefix}.feed_forward.gate.weight", ffn.gate)
        for e, w13, w2 in zip(ffn.experts, ffn.w13, ffn.w2, strict=True):
            yield from _ffn_parts(f"{prefix}.feed_forward.experts.{e}", w13, w2, shard.of_expert.index)


def _ffn_parts(prefix: str, w13: Tensor, w2: Tensor, index: int) -> Iterator[Part]:
    w1, w3 = w13.chunk(2)
    yield Part(f"{prefix}.w1.weight", w1, index)
    yield Part(f"{prefix}.w3.weight", w3, index)
    yield Part(f"{prefix}.w2.weight", w2, index)


def _random(part: Part, whole: list[int]) -> Callable[[Tensor], None]:
    return partial(random_weights.fill, name=part.name, whole=whole, share=part.share(whole))


def _located(model: Transformer, ckpt_dir: Path, wanted: list[Part], shapes: Mapping[str, list[int]]) -> list[Callable[[Tensor], None]]:
    """How each part is read from the folder's files. Nothing is read yet, but everything is there and has its shape.

    What other ranks read is looked for too: all ranks refuse a folder, or none.
    """
    config, stored = model.config, files.open_folder(ckpt_dir, model.embedding.device)
    layout = layouts.find(stored, is_huggingface(ckpt_dir))
    sources: dict[str, Source] = {}
    for name, whole in shapes.items():
        location = layout(name)
        shape = location.stored_shape(whole, config.n_experts)
        if location.name not in stored:
            where = {path for tensor in stored.values() for path in tensor.paths}
            files_there = str(where.pop()) if len(where) == 1 else f"{ckpt_dir}, in {len(where)} files,"
            raise ModelError(f"{files_there} lacks the tensor {location.name} {shape}; {len(stored)} tensors found; is a file missing?")
        sources[name] = Source(stored[location.name], location, shape)
    _require_place_for_all(stored, {source.location.name for source in sources.values()})
    splits = {name: source.stored.split_dim(source.shape) for name, source in sources.items()}
    return [partial(_read_into, sources[part.name], splits[part.name], part.share(shapes[part.name]), config) for part in wanted]


def _require_place_for_all(stored: Mapping[str, Stored], known: set[str]) -> None:
    for name, tensor in stored.items():
        if name not in known and not name.endswith(WITHOUT_PLACE):
            raise ModelError(
                f"{tensor.paths[0]} holds {name} {tensor.pieces[0].shape}, for which the model has no place; is it of another architecture?"
            )


def _read_into(source: Source, split_dim: int | None, share: list[range], config: ModelConfig, place: Tensor) -> None:
    cut = source.location.stored_cut(share, source.shape[0] // config.n_experts)
    target = source.location.view(place, config.head_dim)
    target.copy_(source.stored.read(cut, split_dim).reshape(target.shape))
