"""`python -m worker capacity`: flags → a plan of memory and speed on paper, before any GPU is bought or any weight is read.

Decides what may be asked and how a refusal ends: 1 where the model does not fit, 2 where the question cannot be answered. Knows where GPUs
come from: gpus.toml, a table of the user's own, or nvidia-smi. No torch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from mixtral_worker import capacity, capacity_report, roofline
from mixtral_worker.capacity import DoesNotFit, Gpu, Machine, Setup, Wanted
from mixtral_worker.model.config import ModelConfig, ModelError
from mixtral_worker.settings import SettingsRefused

GPU_TABLE = Path(__file__).with_name("gpus.toml")
NVIDIA_SMI_TIMEOUT_S = 20
TABLE_WIDTH = 120  # where stdout is no terminal
FITS, FITS_NOT, WRONG_QUESTION = 0, 1, 2

DESCRIPTION = """\
Say what a machine can hold of a Mixtral, and how fast it can be at best. Nothing is measured and no GPU is needed.

  python -m worker capacity --model 8x7B --gpu A100-80GB --gpus 2
  python -m worker capacity --model 8x22B --gpu H100 --gpus 4 --precision fp8 --users 64 --explain
  python -m worker capacity --model /models/8x7b --gpu auto --svg roofline.svg
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsRefused(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    flags = _Parser(
        prog="python -m worker capacity", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = flags.add_argument_group("the model")
    what.add_argument("--model", default="8x7B", metavar="8x7B|8x22B|DIR", help="or a folder with params.json (default: %(default)s)")
    what.add_argument("--precision", choices=tuple(capacity.BYTES_PER_WEIGHT), default="bf16", help="of the weights (default: %(default)s)")
    what.add_argument("--kv_dtype", choices=tuple(capacity.KV_BYTES), default="bf16", help="of keys and values (default: %(default)s)")
    what.add_argument("--context", type=int, metavar="N", help="most tokens of a chat (default: what the model allows)")
    machine = flags.add_argument_group("the machine")
    machine.add_argument("--gpu", default="auto", metavar="NAME|auto", help="a card of the table; auto asks nvidia-smi (default: auto)")
    machine.add_argument("--gpus", type=int, metavar="N", help="how many share the model (default: 1; with auto all that are found)")
    machine.add_argument("--gpu_table", type=Path, metavar="FILE", help="a TOML file with more cards, in the form of the shipped gpus.toml")
    machine.add_argument(
        "--memory_share",
        type=float,
        default=capacity.GPU_SHARE,
        metavar="S",
        help="of a GPU's memory that may be filled (default: %(default)s)",
    )
    load = flags.add_argument_group("the load")
    load.add_argument("--users", type=int, default=1, metavar="N", help="chats at once (default: %(default)s)")
    load.add_argument(
        "--chat_tokens", type=int, default=capacity.CHAT_TOKENS, metavar="N", help="a typical chat at its end (default: %(default)s)"
    )
    load.add_argument(
        "--mean_tokens",
        type=int,
        default=capacity.MEAN_TOKENS,
        metavar="N",
        help="its length in the mean over its steps (default: %(default)s)",
    )
    load.add_argument("--prompt_tokens", type=int, default=512, metavar="N", help="for the time to the first token (default: %(default)s)")
    load.add_argument("--speed_share", type=float, metavar="S", help="of the ceiling that is expected (default: what others published)")
    out = flags.add_argument_group("the answer")
    out.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    out.add_argument("--svg", type=Path, metavar="FILE", help="also draw the roofline")
    out.add_argument("--explain", action="store_true", help="explain each number with its formula and values")
    return flags


def main(argv: Sequence[str]) -> int:
    try:
        given = parser().parse_args(argv)
        _print(plan(given), given)
        return FITS
    except DoesNotFit as refused:
        if "--json" in argv:
            print(json.dumps({"fits": False, "reason": refused.reason, "nearest": refused.nearest}))
        print(f"capacity: {refused}", file=sys.stderr)
        return FITS_NOT
    except (SettingsRefused, ModelError) as refused:
        print(f"capacity: {refused}", file=sys.stderr)
        return WRONG_QUESTION


def plan(given: argparse.Namespace) -> capacity_report.Report:
    """All figures for these flags. Raises SettingsRefused, ModelError, DoesNotFit."""
    _check_numbers(given)
    gpus = read_gpus(GPU_TABLE) | (read_gpus(given.gpu_table) if given.gpu_table else {})
    name, model = _model(given.model)
    machine = _machine(given, gpus, model)
    context = given.context or model.max_seq_len
    if context > model.max_seq_len:
        raise SettingsRefused(f"--context is {context:,}; {name} was made for at most {model.max_seq_len:,}; lower it")
    wanted = Wanted(name, model, given.precision, given.kv_dtype, context, chat_tokens=given.chat_tokens)
    memory = machine.memory(given.memory_share)
    divided = capacity.plan_memory(wanted, memory, {name: name for name in ("bf16", "fp8" if machine.gpu.fp8 else "int8", "int4")})
    return capacity_report.build(
        Setup(machine, wanted, divided),
        memory,
        capacity.neighbours(wanted, machine, gpus.values(), given.users, given.memory_share),
        users=given.users,
        prompt_tokens=min(given.prompt_tokens, context),
        mean_tokens=given.mean_tokens,
        share=given.speed_share or capacity_report.speed_share(machine.count),
    )


def _print(report: capacity_report.Report, given: argparse.Namespace) -> None:
    if given.json:
        print(json.dumps(capacity_report.as_json(report, explain=given.explain), allow_nan=False))
    else:
        console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
        capacity_report.print_table(report, console)
        if given.explain:
            console.print()
            capacity_report.print_explanations(report, console)
    if given.svg:
        try:
            given.svg.write_text(roofline.svg(report), encoding="utf-8")
        except OSError as error:
            raise SettingsRefused(f"--svg {given.svg} cannot be written ({error.strerror}); give a file in a folder that exists") from error


def _check_numbers(given: argparse.Namespace) -> None:
    rules = (
        ("gpus", given.gpus is None or given.gpus >= 1, "at least 1"),
        ("context", given.context is None or given.context >= 2, "at least 2 tokens: one of the prompt and one of the answer"),
        ("users", 1 <= given.users <= 100_000, "from 1 to 100000 chats"),
        ("chat_tokens", given.chat_tokens >= 2, "at least 2 tokens"),
        ("mean_tokens", given.mean_tokens >= 1, "at least 1 token"),
        ("prompt_tokens", given.prompt_tokens >= 1, "at least 1 token"),
        ("memory_share", 0 < given.memory_share <= 1, "above 0 and at most 1"),
        ("speed_share", given.speed_share is None or 0 < given.speed_share <= 1, "above 0 and at most 1"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise SettingsRefused(f"--{name} must be {rule}; given {getattr(given, name)}")


def _model(asked: str) -> tuple[str, ModelConfig]:
    """Name and shape of a model known by name, of a checkpoint folder, or of one named as random:…"""
    known = {name.lower(): name for name in capacity.MODELS}
    if asked.lower() in known:
        name = known[asked.lower()]
        return name, capacity.MODELS[name]
    folder = Path(asked)
    if not (folder.is_dir() or asked.startswith("random:")):
        raise SettingsRefused(f"--model {asked} is neither {' nor '.join(capacity.MODELS)} nor a folder; give one of them")
    model = ModelConfig.read(folder)
    return asked if asked.startswith("random:") else folder.resolve().name, model


# ---- GPUs


def read_gpus(path: Path) -> dict[str, Gpu]:
    """Cards by name. Raises SettingsRefused, naming the file and the card."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsRefused(f"{path} is no readable GPU table ({error}); see the form of {GPU_TABLE}") from error
    return {name: _gpu(path, name, card) for name, card in table.items()}


def _gpu(path: Path, name: str, card: Any) -> Gpu:
    numbers = ("memory_gib", "bandwidth_tb_s", "bf16_tflops")
    try:
        figures = {key: float(card[key]) for key in numbers}
        gpu = Gpu(name=name, **figures, fp8=bool(card["fp8"]), source=str(card["source"]), names=tuple(card.get("names", ())))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise SettingsRefused(f"{path} does not describe {name}: {reason}; see the form of {GPU_TABLE}") from error
    if min(figures.values()) <= 0:
        raise SettingsRefused(f"{path} gives {name} a figure that is not above 0: {figures}; see the form of {GPU_TABLE}")
    return gpu


def _machine(given: argparse.Namespace, gpus: dict[str, Gpu], model: ModelConfig) -> Machine:
    possible = model.possible_ranks
    if given.gpu == "auto":
        gpu, found = identify(_ask_nvidia_smi(), gpus)
        count = given.gpus or max(ranks for ranks in possible if ranks <= found)
    else:
        gpu, count = find_gpu(given.gpu, gpus), given.gpus or 1
    if count not in possible:
        raise SettingsRefused(
            f"--gpus is {count}; {model.n_kv_heads} KV heads split evenly over {', '.join(map(str, possible))}; give one of these"
        )
    if given.precision == "fp8" and not gpu.fp8:
        raise SettingsRefused(
            f"--precision fp8 needs tensor cores for it, from compute capability 8.9 on; {gpu.name} has none; int8 takes as much memory"
        )
    return Machine(gpu, count)


def find_gpu(asked: str, gpus: dict[str, Gpu]) -> Gpu:
    """By its name here or by the driver's; case, blanks and hyphens do not count. Raises SettingsRefused."""
    by_name = {_plain(alias): gpu for gpu in gpus.values() for alias in (gpu.name, *gpu.names)}
    if _plain(asked) not in by_name:
        raise SettingsRefused(
            f"--gpu {asked} is not in the table, which knows {', '.join(gpus)}; name one, or add yours with --gpu_table FILE"
        )
    return by_name[_plain(asked)]


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def identify(listing: str, gpus: dict[str, Gpu]) -> tuple[Gpu, int]:
    """nvidia-smi's lines `name, MiB` → the card and how many of it. A card with less memory than the table says counts as it is."""
    cards = [line.rsplit(",", 1) for line in listing.splitlines() if line.strip()]
    kinds = {name.strip() for name, _ in cards}
    if len(kinds) != 1:
        found = ", ".join(sorted(kinds)) or "no GPU"
        raise SettingsRefused(f"--gpu auto found {found}; a worker's GPUs hold equal shares and must be of one kind; name it with --gpu")
    least_gib = min(float(mib) for _, mib in cards) / 1024
    gpu = find_gpu(kinds.pop(), gpus)
    return replace(gpu, memory_gib=min(gpu.memory_gib, least_gib)), len(cards)


def _ask_nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise SettingsRefused("--gpu auto asks nvidia-smi, which is not on PATH; name a card with --gpu, as in --gpu A100-80GB")
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SettingsRefused(f"--gpu auto asks nvidia-smi, which failed ({error}); name a card with --gpu") from error
