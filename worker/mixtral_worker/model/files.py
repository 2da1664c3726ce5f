"""The tensors that a checkpoint folder holds, opened but not read: safetensors and torch files, one or many, whole or in pieces.

Refuses files that are missing, broken, or hold a tensor twice. What the tensors mean is layouts.py's.
"""

import json
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixtral_worker.model.config import ModelError, is_huggingface

INDEX = "model.safetensors.index.json"
Cut = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """A tensor in one file, read only where it is cut."""

    path: Path
    shape: list[int]
    read: Callable[[Cut], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder: in one file, or in a piece or a copy per file."""

    name: str
    pieces: list[Piece]

    @property
    def paths(self) -> list[Path]:
        return [piece.path for piece in self.pieces]

    def split_dim(self, expected: list[int]) -> int | None:
        """Along which dimension the pieces make up the expected shape; None if each is the whole. Raises ModelError."""
        shapes, found = [piece.shape for piece in self.pieces], self.pieces[0].shape
        if all(shape == expected for shape in shapes):
            return None
        if all(shape == found for shape in shapes) and len(found) == len(expected):
            for dim, size in enumerate(found):
                if [*found[:dim], size * len(shapes), *found[dim + 1 :]] == expected:
                    return dim
        odd = next(piece for piece in self.pieces if piece.shape != expected)
        files = f" and stands in {len(shapes)} files" if len(shapes) > 1 else ""
        raise ModelError(
            f"{odd.path}: {self.name} has shape {odd.shape}{files}, but the folder's description makes it {expected}; "
            "is a file missing, or do they not belong together?"
        )

    def read(self, share: Sequence[range], split_dim: int | None) -> Tensor:
        """This share of the whole; a copy only where it reaches over several files."""
        cut = tuple(slice(part.start, part.stop) for part in share)
        if split_dim is None:
            return self.pieces[0].read(cut)
        size, found = self.pieces[0].shape[split_dim], []
        for i, piece in enumerate(self.pieces):
            first, last = max(cut[split_dim].start - i * size, 0), min(cut[split_dim].stop - i * size, size)
            if first < last:
                found.append(piece.read((*cut[:split_dim], slice(first, last), *cut[split_dim + 1 :])))
        return found[0] if len(found) == 1 else torch.cat(found, split_dim)


def open_folder(ckpt_dir: Path, device: torch.device) -> dict[str, Stored]:
    """Every tensor of a folder by name; what is read of a safetensors file comes on the device. Raises ModelError."""
    if is_huggingface(ckpt_dir):
        return _open_safetensors(_files_of_huggingface(ckpt_dir), device)
    if paths := sorted(ckpt_dir.glob("consolidated*.safetensors")):
        return _open_safetensors(_all_of(paths), device)
    if paths := sorted([*ckpt_dir.glob("consolidated*.pth"), *ckpt_dir.glob("consolidated*.pt")]):
        return _open_torch(_all_of(paths))
    raise ModelError(f"{ckpt_dir} holds no consolidated.safetensors and no consolidated.*.pth beside params.json; fetch the weights")


def _files_of_huggingface(ckpt_dir: Path) -> list[Path]:
    index = ckpt_dir / INDEX
    if not index.is_file():
        if paths := sorted(ckpt_dir.glob("model*.safetensors")):
            return _all_of(paths)
        raise ModelError(f"{ckpt_dir} holds neither {INDEX} nor model.safetensors beside config.json; fetch the weights as safetensors")
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = sorted({ckpt_dir / name for name in files.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of safetensors files ({error!r}); fetch it again") from error
    for name, file in files.items():
        if not (ckpt_dir / file).is_file():
            raise ModelError(f"{ckpt_dir / file} is missing, in which {INDEX} places {name}; fetch all {len(paths)} files")
    return paths


def _all_of(paths: list[Path]) -> list[Path]:
    """The same paths, once none is missing between or after them as far as their numbers tell."""
    for path in paths:
        if numbered := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", path.name):
            before, number, count, after = numbered.groups()
            expected = [f"{before}{i:0{len(number)}}-of-{count}{after}" for i in range(1, int(count) + 1)]
        elif numbered := re.fullmatch(r"(consolidated\.)(\d+)(\..*)", path.name):
            before, number, after = numbered.groups()
            expected = [f"{before}{i:0{len(number)}}{after}" for i in range(int(number) + 1)]
        else:
            continue
        for name in expected:
            if path.with_name(name) not in paths:
                raise ModelError(f"{path.with_name(name)} is missing beside {path.name}; {len(paths)} files found; fetch all of them")
    return paths


def _open_safetensors(paths: Iterable[Path], device: torch.device) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for path in paths:
        try:
            file: Any = safe_open(path, framework="pt", device=str(device))
        except SafetensorError as error:
            raise _cut_off(path) or _unreadable(path, "safetensors", error) from error
        for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
            if name in stored:
                raise ModelError(f"the tensor {name} stands in both {stored[name].paths[0]} and {path}; keep one of the files")
            source = file.get_slice(name)
            stored[name] = Stored(name, [Piece(path, list(source.get_shape()), source.__getitem__)])
    return stored


def _open_torch(paths: Sequence[Path]) -> dict[str, Stored]:
    """Tensors in every file are pieces or copies, as Meta splits them by rank; others stand in one file alone."""
    stored: dict[str, Stored] = {}
    for path in paths:
        for name, tensor in _mapped(path).items():
            piece = Piece(path, list(tensor.shape), tensor.__getitem__)
            stored.setdefault(name, Stored(name, [])).pieces.append(piece)
    for name, found in stored.items():
        if 1 < len(found.pieces) < len(paths):
            missing = next(path for path in paths if path not in found.paths)
            raise ModelError(f"{missing} lacks the tensor {name}, of which {len(found.pieces)} of {len(paths)} files hold a piece")
    return stored


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise _unreadable(path, "a torch file", error) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelError(f"{path} holds {type(tensors).__name__} instead of tensors by name; give ckpt_dir a checkpoint as it was released")
    return tensors


def _cut_off(path: Path) -> ModelError | None:
    """What to say of a safetensors file that ends before the tensors of its header do; None if that is not what is wrong."""
    found_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(min(header_bytes, found_bytes)))
            begin = 8 + header_bytes
            ends = {name: begin + int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None
    expected_bytes = max(ends.values(), default=0)
    if expected_bytes <= found_bytes:
        return None
    _, tensor = min((end, name) for name, end in ends.items() if end > found_bytes)
    sizes = f"{expected_bytes:,} bytes expected, {found_bytes:,} bytes found"
    return ModelError(f"{path} is cut off in the tensor {tensor}: {sizes}; fetch the file again")


def _unreadable(path: Path, kind: str, error: Exception) -> ModelError:
    reason = str(error).partition("\n")[0]
    return ModelError(f"{path} cannot be read as {kind} ({reason}); {path.stat().st_size:,} bytes found; fetch the file again")
