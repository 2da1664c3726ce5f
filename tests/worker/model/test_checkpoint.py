"""A checkpoint is read whole, from one file or several, or refused in one sentence that names what is wrong."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_worker.model import checkpoint as checkpoint_files
from mixtral_worker.model.config import ModelConfig, ModelError
from mixtral_worker.model.parallel import Shard
from mixtral_worker.model.transformer import Transformer

WQ = "layers.1.attention.wq.weight"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def load(folder: Path, shard: Shard | None = None) -> Transformer:
    with torch.device("meta"):
        model = Transformer(ModelConfig.read(folder), shard or Shard())
    model.to_empty(device="cpu")
    checkpoint_files.load(model, folder)
    return model


def test_every_tensor_of_the_file_has_its_place_and_no_weight_is_left_unfilled(folder: Path) -> None:
    model = load(folder)
    weights = load_file(folder / "consolidated.safetensors")
    parts = list(checkpoint_files.parts(model))
    assert {part.name for part in parts} == set(weights)
    assert sum(part.place.numel() for part in parts) == sum(parameter.numel() for parameter in model.parameters())
    for part in parts:
        assert torch.equal(part.place, weights[part.name]), part.name


def test_shares_of_all_ranks_make_each_whole_tensor(folder: Path) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    shares = [list(checkpoint_files.parts(load(folder, Shard(index, 4)))) for index in range(4)]
    for of_ranks in zip(*shares, strict=True):
        dim = of_ranks[0].split_dim
        whole = of_ranks[0].place if dim is None else torch.cat([part.place for part in of_ranks], dim)
        assert torch.equal(whole, weights[of_ranks[0].name]), of_ranks[0].name


def test_tensors_may_be_spread_over_several_files(folder: Path) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, folder / "consolidated.00.safetensors")
    save_file({name: weights[name] for name in names[1::2]}, folder / "consolidated.01.safetensors")
    assert torch.equal(load(folder).embedding, weights["tok_embeddings.weight"])


def test_bfloat16_file_fills_float32_weights(folder: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "consolidated.safetensors").items()}
    save_file(weights, folder / "consolidated.safetensors")
    model = load(folder)
    assert model.embedding.dtype == torch.float32
    assert torch.equal(model.embedding, weights["tok_embeddings.weight"].float())


def test_missing_tensor_is_named(folder: Path) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    del weights[WQ]
    save_file(weights, folder / "consolidated.safetensors")
    with pytest.raises(ModelError, match=rf"lacks the tensor {WQ}; \d+ tensors found"):
        load(folder)


def test_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    weights[WQ] = weights[WQ][:-8].contiguous()
    save_file(weights, folder / "consolidated.safetensors")
    with pytest.raises(ModelError, match=rf"consolidated\.safetensors: {WQ} has shape \[56, 64\]; params\.json makes it \[64, 64\]"):
        load(folder)


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, 50_000, -1])
def test_truncated_file_is_named_with_its_size(kept_bytes: int, folder: Path) -> None:
    path = folder / "consolidated.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept_bytes])
    with pytest.raises(ModelError, match=r"consolidated\.safetensors cannot be read as safetensors .* found; fetch the file again"):
        load(folder)


def test_tensor_in_two_files_is_refused(folder: Path) -> None:
    shutil.copy(folder / "consolidated.safetensors", folder / "consolidated.01.safetensors")
    with pytest.raises(ModelError, match="stands in both"):
        load(folder)


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "consolidated.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no consolidated\.safetensors"):
        load(folder)
