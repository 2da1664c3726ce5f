"""`torchrun worker perplexity`: flags → what is to be measured.

Decides what may be asked, and refuses in one sentence. No torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.settings import CKPT_DIR_HELP, PROMPT_FORMATS, RANDOM, SettingsRefused

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULT_SEPARATOR = "<|endoftext|>"

DESCRIPTION = """\
Measure how well a model foretells a text, computed by the worker's own engine on any number of ranks.

  torchrun --nproc_per_node 1 worker perplexity --text stories.txt                     the demo model
  torchrun --nproc_per_node 2 worker perplexity --ckpt_dir /models/8x7b --text wiki.txt --json result.json
  torchrun --nproc_per_node 1 worker perplexity --text stories.txt --compare fp32,bf16
  torchrun --nproc_per_node 1 worker perplexity --text stories.txt --expert_report --svg experts.svg
"""


@dataclass(frozen=True)
class Asked:
    ckpt_dir: Path
    tokenizer_path: Path
    device: str
    text: Path
    separator: str
    as_answer_to: str | None  # None: the text follows BOS
    prompt_format: str
    window: int | None  # None: the model's context
    stride: int | None  # None: half the window
    precisions: tuple[str, ...]  # of PRECISIONS, or auto; the first is what the others are compared with
    seed: int
    json: Path | None
    expert_report: bool
    svg: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsRefused(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    flags = _Parser(
        prog="torchrun --nproc_per_node N worker perplexity",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = flags.add_argument_group("the model")
    what.add_argument("--ckpt_dir", type=Path, metavar="DIR", help=CKPT_DIR_HELP)
    what.add_argument("--tokenizer_path", type=Path, metavar="FILE", help="tokenizer.model (default: that of --ckpt_dir, else the demo's)")
    what.add_argument("--dtype", metavar="|".join(PRECISIONS), help="of weights and KV cache (default: fp32 on a CPU, bf16 on a GPU)")
    what.add_argument("--compare", metavar="P,P…", help="measure in each of these precisions; deltas are against the first")
    what.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="auto: this rank's GPU if there is one (default: auto)")
    text = flags.add_argument_group("the text")
    text.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8, at the same path on every host")
    text.add_argument(
        "--separator", default=DEFAULT_SEPARATOR, metavar="LINE", help="a line that ends a document of the file (default: %(default)s)"
    )
    text.add_argument("--as_answer_to", metavar="MESSAGE", help="take each document as a chat's answer to this, not as plain text")
    text.add_argument("--prompt_format", choices=PROMPT_FORMATS, default="auto", help="for --as_answer_to (default: auto)")
    text.add_argument("--window", type=int, metavar="N", help="tokens seen together (default: what the model allows)")
    text.add_argument("--stride", type=int, metavar="N", help="tokens from one window to the next (default: half of --window)")
    out = flags.add_argument_group("the answer")
    out.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    out.add_argument("--seed", type=int, default=0, metavar="N", help="of the random draws behind intervals (default: %(default)s)")
    out.add_argument("--expert_report", action="store_true", help="also report which experts the routers chose")
    out.add_argument("--svg", type=Path, metavar="FILE", help="draw the expert report as a heat map")
    return flags


def parse(argv: Sequence[str]) -> Asked:
    """Raises SettingsRefused with one sentence; --help prints and exits as argparse does."""
    given = parser().parse_args(argv)
    ckpt_dir: Path = given.ckpt_dir or DEMO_CKPT_DIR
    is_random = str(ckpt_dir).startswith(RANDOM)
    if not (is_random or ckpt_dir.is_dir()):
        raise SettingsRefused(f"--ckpt_dir {ckpt_dir} is not a folder; give the one that holds params.json or config.json and the weights")
    if given.compare and given.dtype:
        raise SettingsRefused("--dtype and --compare both name precisions; put all of them into --compare, the one to compare with first")
    if given.svg and not given.expert_report:
        raise SettingsRefused("--svg draws the expert report; add --expert_report")
    for name, holds, rule in (
        ("window", given.window is None or given.window >= 2, "at least 2 tokens: one seen and one foretold"),
        ("stride", given.stride is None or given.stride >= 1, "at least 1 token"),
        ("seed", given.seed >= 0, "0 or above"),
        ("separator", bool(given.separator.strip()), "a line that is not blank"),
    ):
        if not holds:
            raise SettingsRefused(f"--{name} must be {rule}; given {getattr(given, name)!r}")
    tokenizer = given.tokenizer_path or (DEMO_CKPT_DIR if is_random else ckpt_dir)
    return Asked(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer,
        device=given.device,
        text=given.text,
        separator=given.separator.strip(),
        as_answer_to=given.as_answer_to,
        prompt_format=given.prompt_format,
        window=given.window,
        stride=given.stride,
        precisions=_precisions(given.compare or given.dtype),
        seed=given.seed,
        json=given.json,
        expert_report=given.expert_report,
        svg=given.svg,
    )


def _precisions(names: str | None) -> tuple[str, ...]:
    if names is None:
        return ("auto",)
    long_names = {long: short for short, long in PRECISIONS.items()}
    found = tuple(long_names.get(name, name) for name in names.split(","))
    if unknown := [name for name in found if name not in PRECISIONS]:
        raise SettingsRefused(f"{unknown[0]!r} is no precision of this worker; known are {', '.join(PRECISIONS)}")
    if len(set(found)) < len(found):
        raise SettingsRefused(f"--compare names a precision twice: {names}; name each once")
    return found
