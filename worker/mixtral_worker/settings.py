"""Every setting of the worker: flag, default, limits and one sentence, in one place.

Decides what may be set and refuses, in one sentence, what cannot work. Leaves to cli.py what is started with it. No torch here, so that
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mixtral_worker.demo import DEMO_CKPT_DIR

KEY_VARIABLE = "MIXTRAL_WORKER_KEY"
RANDOM = "random:"  # in place of a folder: this shape with random weights
DTYPES = ("auto", "float32", "bfloat16", "float16")
NORMALIZATION_MODES = ("renorm", "none")
PROMPT_FORMATS = ("auto", "instruct", "mistral")
CKPT_DIR_HELP = "folder with the weights, or random:8x7b and the like for random ones (default: the demo model)"
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_SEED = 2**63 - 1

DESCRIPTION = """\
Serve Mixtral from this machine: pull chats from a server, run them together in one batch, stream the tokens back.

  torchrun --nproc_per_node 1 worker --api_server http://HOST:7777     serve the demo model to a server
  torchrun --nproc_per_node 2 worker --ckpt_dir /models/8x7b --api_server https://chat.example.org
                                                                       serve 8x7B on two GPUs
  torchrun --nproc_per_node 1 worker                                   chat with the demo model in this terminal
  cat letter.txt | torchrun --nproc_per_node 1 worker                  one question by a pipe, the answer on stdout

--nproc_per_node is the number of GPUs (or CPU processes) that share the model: 1, 2, 4 or 8 for Mixtral's 8 KV heads; torchrun
ends with code 1 and a traceback of its own when it is stopped by a signal, whatever the worker returns. The worker needs no open
port: it calls the server, and calls again with growing pauses while the server is away.
"""

EPILOG = f"""\
The worker's key is printed by the server at its first start and stands in <data_dir>/keys.env there:
  . data/keys.env && export {KEY_VARIABLE}
SIGTERM lets running chats finish (20 s), hands the rest back to the queue and logs out; SIGINT hands all of them back at once.
"""


class SettingsRefused(ValueError):
    """These settings cannot work; the message is the one sentence that a person sees."""


@dataclass(frozen=True)
class Settings:
    ckpt_dir: Path
    tokenizer_path: Path
    api_server: str  # without a slash at the end; "": chat in the terminal
    api_auth_key: str
    endpoint_name: str
    name: str
    max_batch_size: int | None  # None: as many chats as memory holds
    max_seq_len: int | None  # None: what the checkpoint allows
    temperature: float  # this and the next three: terminal chat only
    top_p: float
    top_k: int
    seed: int | None
    dtype: str
    device: str
    tp_size: int
    ep_size: int
    moe_normalization_mode: str | None  # None: as the checkpoint folder says
    prompt_format: str
    step_timeout_s: float
    log_level: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise SettingsRefused(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    flags = _Parser(
        prog="torchrun --nproc_per_node N worker",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = flags.add_argument_group("the model")
    model.add_argument("--ckpt_dir", type=Path, metavar="DIR", help=CKPT_DIR_HELP)
    model.add_argument(
        "--tokenizer_path", type=Path, metavar="FILE", help="tokenizer.model (default: that of --ckpt_dir or, for random, the demo)"
    )
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="of weights and KV cache; auto: float32 on a CPU, bfloat16 on a GPU")
    model.add_argument(
        "--tp_size", type=int, metavar="T", help="ranks that share the model: all that torchrun starts (default: their number)"
    )
    model.add_argument(
        "--ep_size",
        type=int,
        default=1,
        metavar="E",
        help="groups of ranks that share out the experts, each then cut in T / E slices (default: 1, every rank has a slice of all)",
    )
    model.add_argument(
        "--moe_normalization_mode",
        choices=NORMALIZATION_MODES,
        help="renorm: the weights of a token's experts sum to 1; none: they stay as the softmax over all experts gives them "
        "(default: as params.json says, else renorm)",
    )
    model.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="auto: this rank's GPU if there is one (default: auto)")
    model.add_argument(
        "--prompt_format",
        choices=PROMPT_FORMATS,
        default="auto",
        help="auto: as the checkpoint folder or its tokenizer says (default: auto)",
    )
    batch = flags.add_argument_group("the batch")
    batch.add_argument(
        "--max_batch_size",
        type=int,
        metavar="N",
        help="chats computed together (default: as many of typical length as memory holds, at most 256, on a CPU 32)",
    )
    batch.add_argument("--max_seq_len", type=int, metavar="N", help="tokens of a chat with its answer (default: what the model allows)")
    batch.add_argument(
        "--step_timeout_s",
        type=float,
        default=60.0,
        metavar="S",
        help="a step that takes longer counts as hung, and the worker ends (default: 60)",
    )
    serve = flags.add_argument_group("the server")
    serve.add_argument("--api_server", metavar="URL", help="address of the server; without it you chat in this terminal")
    serve.add_argument("--api_auth_key", metavar="KEY", help=f"the worker's key (default: ${KEY_VARIABLE}, which other users cannot see)")
    serve.add_argument("--endpoint_name", default="mixtral_chat", metavar="NAME", help="queue to serve (default: %(default)s)")
    serve.add_argument("--name", metavar="NAME", help="how operators see this worker (default: the host's name)")
    serve.add_argument("--log_level", choices=LOG_LEVELS, default="info", help="log lines go to stderr (default: info)")
    chat = flags.add_argument_group("the terminal chat", "with --api_server each chat brings its own")
    chat.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (default: 0.8)")
    chat.add_argument("--top_p", type=float, default=0.9, metavar="P", help="draw from the likeliest tokens that make up P (default: 0.9)")
    chat.add_argument("--top_k", type=int, default=40, metavar="K", help="draw from the K likeliest tokens, 0: from all (default: 40)")
    chat.add_argument("--seed", type=int, metavar="N", help="same seed, same answers (default: another one each time)")
    return flags


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Flags and environment → Settings. Raises SettingsRefused with one sentence; --help prints and exits as argparse does."""
    given = parser().parse_args(argv)
    _check_numbers(given)
    tp_size = _tp_size(given.tp_size, given.ep_size, int(environment.get("WORLD_SIZE", "1")))
    ckpt_dir: Path = given.ckpt_dir or DEMO_CKPT_DIR
    is_random = str(ckpt_dir).startswith(RANDOM)
    if not (is_random or ckpt_dir.is_dir()):
        raise SettingsRefused(f"--ckpt_dir {ckpt_dir} is not a folder; give the one that holds params.json or config.json and the weights")
    api_server = _server_address(given.api_server) if given.api_server is not None else ""
    key = given.api_auth_key or environment.get(KEY_VARIABLE, "")
    if api_server and not key:
        raise SettingsRefused(
            f"--api_server {api_server} asks every worker for a key and none was given; "
            f"set {KEY_VARIABLE} (or --api_auth_key) to the one in keys.env in the server's data folder"
        )
    if not all("!" <= character <= "~" for character in key):
        raise SettingsRefused(f"the worker's key must be printable ASCII without blanks; copy it again from keys.env into {KEY_VARIABLE}")
    return Settings(
        ckpt_dir=ckpt_dir,
        tokenizer_path=_tokenizer_file(given.tokenizer_path or (DEMO_CKPT_DIR if is_random else ckpt_dir)),
        api_server=api_server,
        api_auth_key=key,
        endpoint_name=given.endpoint_name,
        name=given.name or socket.gethostname(),
        max_batch_size=given.max_batch_size,
        max_seq_len=given.max_seq_len,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        seed=given.seed,
        dtype=given.dtype,
        device=given.device,
        tp_size=tp_size,
        ep_size=given.ep_size,
        moe_normalization_mode=given.moe_normalization_mode,
        prompt_format=given.prompt_format,
        step_timeout_s=given.step_timeout_s,
        log_level=given.log_level,
    )


def _tp_size(tp_size: int | None, ep_size: int, world: int) -> int:
    if tp_size is not None and tp_size != world:
        started = f"{world} rank" if world == 1 else f"{world} ranks"
        remedy = f"run with --nproc_per_node {tp_size}" if tp_size > 0 else "leave it out"
        raise SettingsRefused(f"--tp_size is {tp_size}, but torchrun started {started}, and all ranks share one model; {remedy}")
    if ep_size < 1 or world % ep_size:
        sizes = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
        raise SettingsRefused(f"--ep_size is {ep_size}; it must divide the {world} ranks (tp_size); give one of {sizes}")
    return world


def _check_numbers(given: argparse.Namespace) -> None:
    rules = (
        ("max_batch_size", given.max_batch_size is None or 1 <= given.max_batch_size <= 4096, "from 1 to 4096 chats"),
        ("max_seq_len", given.max_seq_len is None or given.max_seq_len >= 2, "at least 2 tokens: one of the prompt and one of the answer"),
        ("temperature", math.isfinite(given.temperature) and 0 <= given.temperature <= 2, "from 0 to 2"),
        ("top_p", 0 < given.top_p <= 1, "above 0 and at most 1"),
        ("top_k", 0 <= given.top_k <= 1000, "from 0 (all) to 1000"),
        ("seed", given.seed is None or -MAX_SEED - 1 <= given.seed <= MAX_SEED, "a signed 64-bit number"),
        ("step_timeout_s", 1 <= given.step_timeout_s <= 86_400, "from 1 second to a day"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise SettingsRefused(f"--{name} must be {rule}; given {getattr(given, name)}")
    for name in ("endpoint_name", "name"):
        text = getattr(given, name)
        if text is not None and not 0 < len(text) <= 100:
            raise SettingsRefused(f"--{name} must have 1 to 100 characters; given {len(text)}")


def _server_address(text: str) -> str:
    form = "give it as http://HOST:PORT or https://HOST"
    try:
        address = urlsplit(text)
        host, _ = address.hostname, address.port
    except ValueError as error:
        raise SettingsRefused(f"--api_server {text!r} is no address ({error}); {form}") from error
    if address.scheme not in ("http", "https") or not host:
        raise SettingsRefused(f"--api_server {text!r} is no http address; {form}")
    if address.username or address.password or address.query or address.fragment:
        raise SettingsRefused(f"--api_server must hold neither a password nor a query; {form} and the key by {KEY_VARIABLE}")
    return text.rstrip("/")


def _tokenizer_file(path: Path) -> Path:
    return path / "tokenizer.model" if path.is_dir() else path
