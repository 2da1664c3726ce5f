"""Fill a Transformer with a checkpoint, or with random numbers in its place, each rank reading its own slices.

Decides which tensor belongs into which weight, and that nothing is missing, left over or of another shape before the first is read. Each
slice goes from the mapped file to its place on the device; at no time are there two copies of the weights. files.py opens what the folder
holds, layouts.py knows how each layout names and turns a tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mixtral_worker.model import files, layouts, random_weights
from mixtral_worker.model.config import ModelConfig, ModelError, is_huggingface
from mixtral_worker.model.files import Stored
from mixtral_worker.model.layouts import Location
from mixtral_worker.model.transformer import FeedForward, Transformer
from mixtral_worker.settings import RANDOM

Progress = Callable[[int, int], None]  # bytes filled, bytes in all, on this rank
WITHOUT_PLACE = ("rope.freqs", "rotary_emb.inv_freq")  # computed here


@dataclass(frozen=True)
class Part:
    """A tensor, by its name in Mistral's layout, and the place of this rank's share of it."""

    name: str
    place: Tensor
    split_dim: int | None = None  # the dimension cut over the ranks; None: every rank holds the whole

    def whole(self, ranks: int) -> list[int]:
        return [size * ranks if dim == self.split_dim else size for dim, size in enumerate(self.place.shape)]

    def share(self, rank: int) -> list[range]:
        firsts = [rank * size if dim == self.split_dim else 0 for dim, size in enumerate(self.place.shape)]
        return [range(first, first + size) for first, size in zip(firsts, self.place.shape, strict=True)]


def load(model: Transformer, ckpt_dir: Path, progress: Progress | None = None) -> None:
    """Fill the model's weights, converting to its dtype. Raises ModelError naming file, tensor, expected and found."""
    wanted = list(parts(model))
    readings = [_random(model, part) for part in wanted] if str(ckpt_dir).startswith(RANDOM) else _located(model, ckpt_dir, wanted)
    total = sum(part.place.nbytes for part in wanted)
    filled = 0
    for part, read_into in zip(wanted, readings, strict=True):
        read_into(part.place)
        filled += part.place.nbytes
        if progress:
            progress(filled, total)


def parts(model: Transformer) -> Iterator[Part]:
    """Every tensor of the model and where it belongs."""
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
        ffn = layer.feed_forward
        if isinstance(ffn, FeedForward):
            yield from _ffn_parts(f"{prefix}.feed_forward", ffn.w13.weight, ffn.w2.weight)
            continue
        yield Part(f"{prefix}.feed_forward.gate.weight", ffn.gate)
        for e in range(config.n_experts):
            yield from _ffn_parts(f"{prefix}.feed_forward.experts.{e}", ffn.w13[e], ffn.w2[e])


def _ffn_parts(prefix: str, w13: Tensor, w2: Tensor) -> Iterator[Part]:
    w1, w3 = w13.chunk(2)
    yield Part(f"{prefix}.w1.weight", w1, 0)
    yield Part(f"{prefix}.w3.weight", w3, 0)
    yield Part(f"{prefix}.w2.weight", w2, 1)


def _random(model: Transformer, part: Part) -> Callable[[Tensor], None]:
    return partial(random_weights.fill, name=part.name, whole=part.whole(model.shard.count), share=part.share(model.shard.index))


def _located(model: Transformer, ckpt_dir: Path, wanted: list[Part]) -> list[Callable[[Tensor], None]]:
    """How each part is read from the folder's files. Nothing is read yet, but everything is there and has its shape."""
    stored = files.open_folder(ckpt_dir, model.embedding.device)
    layout = layouts.find(stored, is_huggingface(ckpt_dir))
    locations = [layout(part.name) for part in wanted]
    shapes = [
        location.stored_shape(part.whole(model.shard.count), model.config.n_experts)
        for part, location in zip(wanted, locations, strict=True)
    ]
    for location, shape in zip(locations, shapes, strict=True):
        if location.name not in stored:
            raise ModelError(f"{ckpt_dir} lacks the tensor {location.name} {shape}; {len(stored)} tensors found; is a file missing?")
    _require_place_for_all(stored, {location.name for location in locations})
    return [
        _reading(stored[location.name], location, shape, part.share(model.shard.index), model.config)
        for part, location, shape in zip(wanted, locations, shapes, strict=True)
    ]


def _require_place_for_all(stored: Mapping[str, Stored], known: set[str]) -> None:
    for name, tensor in stored.items():
        if name not in known and not name.endswith(WITHOUT_PLACE):
            raise ModelError(
                f"{tensor.paths[0]} holds {name} {tensor.pieces[0].shape}, for which the model has no place; is it of another architecture?"
            )


def _reading(stored: Stored, location: Location, shape: list[int], share: list[range], config: ModelConfig) -> Callable[[Tensor], None]:
    split_dim = stored.split_dim(shape)
    cut = location.stored_cut(share, shape[0] // config.n_experts)

    def read_into(place: Tensor) -> None:
        target = location.view(place, config.head_dim)
        target.copy_(stored.read(cut, split_dim).reshape(target.shape))

    return read_into
