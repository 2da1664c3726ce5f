"""A checkpoint of any layout is read value for value, within its own memory, or refused in one sentence that names what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral_worker.model import checkpoint as checkpoint_files
from mixtral_worker.model.config import ModelConfig, ModelError
from mixtral_worker.model.parallel import Shard
from mixtral_worker.model.transformer import Transformer
from support import peak_memory
from support.checkpoint_layouts import LAYOUTS

WQ = "layers.1.attention.wq.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def copied(layouts: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(layouts[name], tmp_path / name))


def load(folder: Path, shard: Shard | None = None) -> Transformer:
    with torch.device("meta"):
        model = Transformer(ModelConfig.read(folder), shard or Shard())
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.fill_(torch.nan)
    checkpoint_files.load(model, folder)
    return model


def assert_shares_make(weights: dict[str, Tensor], folder: Path, ranks: int, ep_size: int = 1) -> None:
    """What all ranks read, set together, is each tensor of the original, number for number."""
    models = [load(folder, Shard(index, ranks, ep_size=ep_size)) for index in range(ranks)]
    assert not any(weight.isnan().any() for model in models for weight in model.parameters())
    together = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    for part in (part for model in models for part in checkpoint_files.parts(model)):
        share = part.share(list(weights[part.name].shape))
        together[part.name][tuple(slice(cut.start, cut.stop) for cut in share)] = part.place
    for name, tensor in weights.items():
        assert torch.equal(together[name], tensor), name


# What is read


@pytest.mark.parametrize("ranks", [1, 4])
def test_shares_of_all_ranks_make_each_whole_tensor(ranks: int, checkpoint: Path) -> None:
    assert_shares_make(load_file(checkpoint / "consolidated.safetensors"), checkpoint, ranks)


@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_numbers_of_the_original(
    layout: str, ranks: int, ep_size: int, layouts: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    if ep_size > 1 and not ModelConfig.read(layouts[layout]).is_moe:
        with pytest.raises(ModelError, match=r"a dense model, which is one expert, .* allow 1"):
            ModelConfig.read(layouts[layout]).require_ranks(ranks, ep_size)
        return
    assert_shares_make(load_file(checkpoints[LAYOUTS[layout]] / "consolidated.safetensors"), layouts[layout], ranks, ep_size)


def test_each_rank_reads_its_own_experts_and_no_other(checkpoint: Path) -> None:
    model = load(checkpoint, Shard(3, 4, ep_size=2))
    read = {part.name for part in checkpoint_files.parts(model)}
    assert {name.split(".")[4] for name in read if ".experts." in name} == {"4", "5", "6", "7"}
    assert model.layers[0].feed_forward.w13.shape == (4, 96, 64)


def test_expert_that_only_another_rank_reads_is_missed_by_all(folder: Path) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    del weights["layers.1.feed_forward.experts.7.w2.weight"]
    save_file(weights, folder / "consolidated.safetensors")
    for index in range(2):
        with pytest.raises(ModelError, match=r"lacks the tensor layers\.1\.feed_forward\.experts\.7\.w2\.weight \[64, 96\]"):
            load(folder, Shard(index, 2, ep_size=2))


def test_tensors_may_be_spread_over_several_files(folder: Path) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, folder / "consolidated.00.safetensors")
    save_file({name: weights[name] for name in names[1::2]}, folder / "consolidated.01.safetensors")
    assert_shares_make(weights, folder, 1)


def test_huggingface_folder_of_one_file_needs_no_index(copied: Callable[[str], Path], checkpoints: dict[str, Path]) -> None:
    folder = copied("dense.huggingface")
    files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    together = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    for path in (folder / INDEX, *(folder / file for file in files)):
        path.unlink()
    save_file(together, folder / "model.safetensors")
    assert_shares_make(load_file(checkpoints["dense"] / "consolidated.safetensors"), folder, 2)


def test_of_two_layouts_in_one_folder_mistrals_own_is_read(folder: Path, layouts: dict[str, Path]) -> None:
    for path in layouts["wide_heads.older_huggingface"].iterdir():
        shutil.copy(path, folder)
    assert_shares_make(load_file(folder / "consolidated.safetensors"), folder, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_file_of_half_precision_fills_float32_weights(dtype: torch.dtype, folder: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "consolidated.safetensors").items()}
    save_file(weights, folder / "consolidated.safetensors")
    assert load(folder).embedding.dtype == torch.float32
    assert_shares_make({name: tensor.float() for name, tensor in weights.items()}, folder, 1)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What loading takes from each layout, measured in a process of its own."""
    root = tmp_path_factory.mktemp("large")
    folders = {layout: str(peak_memory.write_large(layout, root / layout)) for layout in peak_memory.LAYOUTS}
    folders |= {f"{layout}, a share": f"{folders[layout]}{peak_memory.AS_A_SHARE}" for layout in peak_memory.SHARED_LAYOUTS}
    project = Path(peak_memory.__file__).parents[2]
    environment = {**os.environ, **peak_memory.ENVIRONMENT, "PYTHONPATH": f"{project / 'worker'}{os.pathsep}{project / 'tests'}"}
    command = [sys.executable, "-m", peak_memory.__name__, *folders.values()]
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=100)
    measured = json.loads(ended.stdout)
    shutil.rmtree(root)
    return {layout: measured[folder] for layout, folder in folders.items()}


@pytest.mark.parametrize("layout", [*peak_memory.LAYOUTS, *(f"{layout}, a share" for layout in peak_memory.SHARED_LAYOUTS)])
def test_loading_takes_the_memory_of_the_weights_and_of_one_tensor_more(layout: str, peaks: dict[str, dict[str, int]]) -> None:
    """Two copies of the weights would take twice as much: the largest tensor is about a tenth of them. A share: of 4 ranks in 2 groups."""
    measured = peaks[layout]
    assert measured["weights"] > 60e6 if "share" not in layout else 30e6 < measured["weights"] < 45e6
    assert 0.9 * measured["weights"] < measured["peak"] < measured["weights"] + 1.5 * measured["largest"]


# What is refused


def test_missing_tensor_is_named_with_the_shape_it_should_have(folder: Path) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    del weights[WQ]
    save_file(weights, folder / "consolidated.safetensors")
    with pytest.raises(
        ModelError, match=rf"checkpoint/consolidated\.safetensors lacks the tensor {WQ} \[64, 64\]; \d+ tensors found; is a file missing"
    ):
        load(folder)


def test_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    weights[WQ] = weights[WQ][:-8].contiguous()
    save_file(weights, folder / "consolidated.safetensors")
    with pytest.raises(ModelError, match=rf"consolidated\.safetensors: {WQ} has shape \[56, 64\], but .* makes it \[64, 64\]"):
        load(folder)


def test_tensor_without_a_place_is_named_as_a_sign_of_another_architecture(folder: Path) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    save_file(weights | {"layers.0.attention.wq.bias": torch.zeros(64)}, folder / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"consolidated\.safetensors holds layers\.0\.attention\.wq\.bias \[64\], .* another architecture"):
        load(folder)


def test_dense_weights_under_a_description_with_experts_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["windowed"], tmp_path / "mixed"))
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"moe": {"num_experts": 8, "num_experts_per_tok": 2}}))
    with pytest.raises(ModelError, match=r"lacks the tensor layers\.0\.feed_forward\.gate\.weight \[8, 32\]"):
        load(folder)


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, 50_000, -1])
@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("", "consolidated.safetensors"),
        ("grouped.huggingface", "model-00002-of-00008.safetensors"),
        ("grouped.first_release", "consolidated.00.pth"),
    ],
)
def test_truncated_file_is_named_with_its_size(
    layout: str, file: str, kept_bytes: int, folder: Path, copied: Callable[[str], Path]
) -> None:
    path = (copied(layout) if layout else folder) / file
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ModelError, match=rf"{file} .*[^0-9,]{path.stat().st_size:,} bytes found; fetch the file again"):
        load(path.parent)


def test_truncated_safetensors_name_the_tensor_and_both_sizes(folder: Path) -> None:
    path = folder / "consolidated.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=rf"is cut off in the tensor \S+: {len(whole):,} bytes expected, {len(whole) - 1:,} bytes found"):
        load(folder)
    first = min(load_offsets(whole).items(), key=lambda entry: entry[1])[0]
    path.write_bytes(whole[: 8 + int.from_bytes(whole[:8], "little") + 5])
    with pytest.raises(ModelError, match=f"is cut off in the tensor {first}: "):
        load(folder)


def load_offsets(file: bytes) -> dict[str, int]:
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def test_torch_file_that_would_run_code_is_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder, ran = copied("windowed.torch"), tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {ran}",)

    torch.save({"norm.weight": Runs()}, folder / "consolidated.00.pth")
    with pytest.raises(ModelError, match=r"consolidated\.00\.pth cannot be read as a torch file"):
        load(folder)
    assert not ran.exists()


def test_torch_file_without_tensors_by_name_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("windowed.torch")
    torch.save([torch.zeros(2)], folder / "consolidated.00.pth")
    with pytest.raises(ModelError, match=r"consolidated\.00\.pth holds list instead of tensors by name"):
        load(folder)


@pytest.mark.parametrize(
    ("layout", "lost", "beside"),
    [
        ("grouped.huggingface", "model-00003-of-00008.safetensors", INDEX),
        ("no_groups.spread", "consolidated.01.pt", "consolidated.02.pt"),
        ("dense.meta", "consolidated.00.pth", "consolidated.01.pth"),
    ],
)
def test_lost_file_is_named(layout: str, lost: str, beside: str, copied: Callable[[str], Path]) -> None:
    folder = copied(layout)
    (folder / lost).unlink()
    with pytest.raises(ModelError, match=rf"{lost} is missing.*{beside}"):
        load(folder)


def test_lost_file_is_named_without_an_index_too(copied: Callable[[str], Path]) -> None:
    folder = copied("grouped.huggingface")
    (folder / INDEX).unlink()
    (folder / "model-00008-of-00008.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00008-of-00008\.safetensors is missing beside .*; 7 files found"):
        load(folder)


def test_wrong_number_of_pieces_is_named_with_shapes_and_files(copied: Callable[[str], Path]) -> None:
    folder = copied("dense.meta")
    (folder / "consolidated.03.pth").unlink()
    message = r"consolidated\.00\.pth: tok_embeddings\.weight has shape \[64, 8\] and stands in 3 files, but .* makes it \[64, 32\]"
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_piece_that_one_file_lacks_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("dense.meta")
    pieces = torch.load(folder / "consolidated.02.pth")
    del pieces[WQ]
    torch.save(pieces, folder / "consolidated.02.pth")
    with pytest.raises(ModelError, match=rf"consolidated\.02\.pth lacks the tensor {WQ}, of which 3 of 4 files hold a piece"):
        load(folder)


def test_tensor_in_two_files_is_refused(folder: Path) -> None:
    shutil.copy(folder / "consolidated.safetensors", folder / "consolidated-copy.safetensors")
    with pytest.raises(ModelError, match="stands in both"):
        load(folder)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 3}}'])
def test_index_that_is_none_is_named(index: str, copied: Callable[[str], Path]) -> None:
    folder = copied("dense.huggingface")
    (folder / INDEX).write_text(index)
    with pytest.raises(ModelError, match=rf"{INDEX} is no index of safetensors files"):
        load(folder)


def test_folder_without_weights_is_refused(folder: Path, copied: Callable[[str], Path]) -> None:
    (folder / "consolidated.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no consolidated\.safetensors and no consolidated\.\*\.pth"):
        load(folder)
    for path in (huggingface := copied("dense.huggingface")).glob("model*"):
        path.unlink()
    with pytest.raises(ModelError, match=rf"holds neither {INDEX} nor model\.safetensors"):
        load(huggingface)


def test_refused_checkpoint_fills_no_weight(folder: Path) -> None:
    """The last tensor is looked for before the first is read."""
    weights = load_file(folder / "consolidated.safetensors")
    del weights["layers.1.feed_forward.experts.7.w2.weight"]
    save_file(weights, folder / "consolidated.safetensors")
    model = Transformer(ModelConfig.read(folder), Shard())
    for weight in model.parameters():
        weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="lacks the tensor"):
        checkpoint_files.load(model, folder)
    assert all(weight.isnan().all() for weight in model.parameters())
