"""`torchrun worker bench`: flags → what is to be measured. Decides what may be asked, and refuses in one sentence. No torch here."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mixtral_worker.settings import SettingsRefused

SHAPES = ("demo", "large", "8x7b-4", "8x7b")
DEFAULT_SHAPES = {"cpu": SHAPES[:2], "cuda": SHAPES[2:]}
WITHOUT_PEERS = ("8x7b",)  # no card holds it twice
OURS = "mixtral-chat"
PEERS = {"transformers": "transformers", "transformers-continuous": "transformers", "llama.cpp": "llama_cpp"}  # → the package it needs

DESCRIPTION = """\
Measure this engine beside its peers, on this machine's CPU or on its card: the same weights, threads and chats, in turns, in one run.

  torchrun --nproc_per_node 1 worker bench                                   the device's shapes, every peer that is installed
  torchrun --nproc_per_node 1 worker bench --shapes demo --rounds 7 --json demo.json
  torchrun --nproc_per_node 1 worker bench --device cpu --peers llama.cpp --threads 8

Peers come with `pip install 'mixtral-chat[peers]'`. The shapes of a CPU: demo, the shipped model in float32, which fits a processor's
cache; and large, 625 M random parameters in bfloat16 (1.25 GB), which does not. Those of a card, both random and in bfloat16: 8x7b-4, four
layers of Mixtral 8x7B (12 GB for each of those who are compared); and 8x7b, all of it (93 GB), alone. llama.cpp takes part on a CPU.
"""


@dataclass(frozen=True)
class Asked:
    shapes: tuple[str, ...]
    peers: tuple[str, ...]
    device: str
    threads: int
    rounds: int
    seed: int
    json: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsRefused(f"{message}; see --help")


def parse(argv: Sequence[str], ranks: int, has_card: Callable[[], bool]) -> Asked:
    """Raises SettingsRefused with one sentence; --help prints and exits."""
    flags = _Parser(
        prog="torchrun --nproc_per_node 1 worker bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the card if there is one (default: auto)")
    flags.add_argument("--shapes", metavar="A,B", help=f"of {', '.join(SHAPES)} (default: those of the device)")
    flags.add_argument("--peers", metavar="A,B", help=f"of {', '.join(PEERS)}; none: this engine alone (default: those that are installed)")
    flags.add_argument("--threads", type=int, default=_processors(), metavar="N", help="for everyone (default: the processors)")
    flags.add_argument("--rounds", type=int, default=5, metavar="N", help="the figures are medians over them (default: 5)")
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="of the chats (default: 0)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    given = flags.parse_args(argv)
    if ranks != 1:
        raise SettingsRefused(f"bench compares one process with its peers; torchrun started {ranks} ranks; run with --nproc_per_node 1")
    for name in ("threads", "rounds"):
        if not 1 <= getattr(given, name) <= 1024:
            raise SettingsRefused(f"--{name} must be from 1 to 1024; given {getattr(given, name)}")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise SettingsRefused(f"--json {given.json} cannot be written: {given.json.absolute().parent} is no folder")
    device = "cuda" if given.device == "cuda" or (given.device == "auto" and has_card()) else "cpu"
    able = tuple(peer for peer in PEERS if device == "cpu" or peer != "llama.cpp")
    found = tuple(peer for peer in able if importlib.util.find_spec(PEERS[peer]))
    peers = () if given.peers == "none" else _chosen("peers", given.peers, tuple(PEERS)) if given.peers else found
    if unable := [peer for peer in peers if peer not in able]:
        raise SettingsRefused(f"--peers {unable[0]} is measured on a CPU only; give --device cpu, or leave it out")
    if missing := [peer for peer in peers if peer not in found]:
        raise SettingsRefused(f"--peers {missing[0]} is not installed; pip install 'mixtral-chat[peers]', or leave it out")
    shapes = _chosen("shapes", given.shapes, SHAPES) if given.shapes else DEFAULT_SHAPES[device]
    return Asked(shapes, peers, device, given.threads, given.rounds, given.seed, given.json)


def _chosen(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise SettingsRefused(f"--{flag} {name!r} is none of {', '.join(known)}")
    return names


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
