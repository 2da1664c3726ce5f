"""Flags: what a run may be asked for, in which words, and which wishes contradict each other.

Decides names, defaults, units and the sentence of every refusal before anything is sent. Leaves what a run does with them to run.py.
The short flags are those of AIME's benchmark tool, where they mean the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from yarl import URL

from mixtral_benchmark.arrivals import CONSTANT
from mixtral_benchmark.goals import MEASURES, parse_goals
from mixtral_benchmark.prompts import START_PROMPT
from mixtral_benchmark.wires import Target

DEFAULT_SERVER = "http://127.0.0.1:7777"
DEFAULT_REQUESTS = 64
DEFAULT_CONCURRENCY = 16
DEFAULT_CONCURRENCY_SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DEFAULT_RATE_SWEEP = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
TEXTS = ("prompt", "prompt_file", "context_length", "input_tokens", "trace")
PACES = ("request_rate", "trace", "sweep_concurrency", "sweep_rate")
CHATS_PER_PLACE = 3
"""A sweep's run has at least so many chats for each at once: fewer would be all ramp."""

USAGE = """\
python -m benchmark --api_server URL --total_requests N [more flags]
       python -m benchmark compare A.json B.json
       python -m benchmark side_by_side [--help]"""

DESCRIPTION = """\
Send many chats at once to a running server and measure, from this side of the network, how fast their tokens come.

Progress goes to stderr, a table to stdout, and the last line of stdout is one JSON object with every figure
(keys as `vllm bench serve` names them). docs/benchmarking.md says what each figure means."""

EPILOG = """\
examples
  python -m benchmark --total_requests 64 --concurrent_requests 16
        16 chats at a time until 64 are done; asks a slow server less
  python -m benchmark --total_requests 500 --request_rate 2 --slo ttft_ms:500 tpot_ms:50
        two new chats a second at random moments, as many users would send them, however slow the server is; how many were served well
  python -m benchmark --sweep_concurrency --html_file sweep.html
        1, 2, 4, 8 … chats at once until more bring no more tokens a second; plots in one file
  python -m benchmark --input_tokens 2000 --shared_prefix_tokens 1500 --prefixes 4 --max_tokens 128 --ignore_eos
        prompts of 2,000 tokens with four beginnings that several share, answers of exactly 128 tokens
  python -m benchmark --context_length 8K --concurrent_requests 4
        long texts that fill a context of 8,192 tokens
  python -m benchmark --turns 5 --think_s 2
        chats of five turns, two seconds between answer and next turn
  python -m benchmark --trace monday.jsonl --trace_speed 2
        what was asked on Monday, twice as fast
  python -m benchmark --total_requests 64 --verify
        also checks every stream against the server's log of the chat
  python -m benchmark --chaos --total_requests 200
        a house of its own, whose replicas and workers are killed meanwhile; what each kill cost, and that no token was lost
  python -m benchmark --base_url http://gpu-box:8000/v1 --endpoint_name mistralai/Mixtral-8x7B-Instruct-v0.1
        any other server that speaks OpenAI's API
  python -m benchmark compare before.json after.json
        two results, with ratios
  python -m benchmark side_by_side
        our whole stack, `transformers serve` and llama.cpp's server on the same weights, with ratios

exit code
  0 every chat completed   1 some failed (the table names why)   2 nothing was sent   130 interrupted with Ctrl-C"""


@dataclass(frozen=True)
class Flags:
    """One benchmark, as asked for. Everything but the key goes into the result."""

    api_server: str
    endpoint_name: str
    api: str
    verify: bool
    total_requests: int | None
    concurrent_requests: int | None
    request_rate: float | None
    burstiness: float
    ramp_to: float | None
    trace: Path | None
    trace_speed: float
    sweep_concurrency: tuple[int, ...] | None
    sweep_rate: tuple[float, ...] | None
    chaos: bool
    chaos_every_s: float
    warmup_requests: int
    timeout_s: float
    prompt: str | None
    prompt_file: Path | None
    context_length: int | None
    input_tokens: int | None
    input_spread: float
    shared_prefix_tokens: int
    prefixes: int
    turns: int
    think_s: float
    max_tokens: int
    ignore_eos: bool
    temperature: float | None
    seed: int | None
    slo: tuple[str, ...]
    json_file: Path | None
    csv_file: Path | None
    html_file: Path | None

    def shown(self) -> dict[str, object]:
        """For the result: numbers and texts only, and what cannot be written in JSON as text."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        return plain | {"burstiness": "constant" if self.burstiness == CONSTANT else self.burstiness}

    @property
    def goals(self) -> dict[str, float]:
        return parse_goals(self.slo)

    @property
    def is_open_loop(self) -> bool:
        return self.request_rate is not None or self.trace is not None

    @property
    def runs(self) -> list[Flags]:
        """One run, or those of a sweep."""
        total = self.total_requests or DEFAULT_REQUESTS
        if self.sweep_concurrency:
            levels = [(level, max(total, CHATS_PER_PLACE * level)) for level in self.sweep_concurrency]
            return [replace(self, concurrent_requests=level, total_requests=chats) for level, chats in levels]
        if self.sweep_rate:
            return [replace(self, request_rate=rate, total_requests=total) for rate in self.sweep_rate]
        return [self]

    @property
    def in_words(self) -> str:
        total = self.total_requests or DEFAULT_REQUESTS
        cap = f"at most {self.concurrent_requests} at once" if self.concurrent_requests else "however many are open"
        if self.trace:
            chats, pace = "the chats", f"at the moments of {self.trace} at {self.trace_speed:g} times its speed, {cap}"
        elif self.request_rate is not None:
            ramp = f"{self.request_rate:g}" if self.ramp_to is None else f"{self.request_rate:g} rising to {self.ramp_to:g}"
            gaps = {1.0: "at random", CONSTANT: "evenly"}.get(self.burstiness, f"with burstiness {self.burstiness:g}")
            chats, pace = f"{total} chats", f"{ramp} a second {gaps}, {cap}"
        else:
            chats, pace = f"{total} chats", f"{min(self.concurrent_requests or total, total)} at once"
        turns = f" of {self.turns} turns" if self.turns > 1 else ""
        return f"{chats}{turns}, {pace}, up to {self.max_tokens} tokens each"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {text}")
    return number


def _count_or_zero(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more; got {text}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0; got {text}")
    return number


def _duration(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more; got {text}")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be 0 to less than 1; got {text}")
    return number


def _burstiness(text: str) -> float:
    if text == "constant":
        return CONSTANT
    try:
        return _positive(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number above 0, or constant; got {text!r}") from None


def _tokens(text: str) -> int:
    """8192, 8K, 32k."""
    return _count(text[:-1]) * 1024 if text[-1:] in ("K", "k") else _count(text)


def levels(text: str) -> tuple[int, ...]:
    """1,2,4: rising numbers of chats at once."""
    return tuple(_rising([_count(part) for part in text.split(",")], text))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(_rising([_positive(part) for part in text.split(",")], text))


N = TypeVar("N", int, float)


def _rising(numbers: list[N], text: str) -> list[N]:
    if sorted(set(numbers)) != numbers:
        raise argparse.ArgumentTypeError(f"must be rising numbers with commas between; got {text!r}")
    return numbers


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError(f"must be 0 (greedy) to 2; got {text}")
    return number


def _goal(text: str) -> str:
    try:
        parse_goals([text])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def server_url(text: str) -> str:
    """Without a trailing slash or /v1."""
    url = URL(text.rstrip("/"))
    if url.scheme not in ("http", "https") or not url.host:
        raise argparse.ArgumentTypeError(f"must be http://HOST:PORT or https://HOST; got {text!r}")
    if url.user or url.password:
        raise argparse.ArgumentTypeError("must hold no user or password, because results name it; give the key by --api_key")
    return str(url).rstrip("/").removesuffix("/v1")


def parser() -> argparse.ArgumentParser:
    reader = argparse.ArgumentParser(
        prog="mixtral-benchmark",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_target(reader.add_argument_group("target"))
    _add_load(reader.add_argument_group("load"))
    _add_chat(reader.add_argument_group("each chat"))
    _add_output(reader.add_argument_group("judgement and output"))
    return reader


_Group = argparse._ArgumentGroup


def _add_target(group: _Group) -> None:
    group.add_argument("-as", "--api_server", type=server_url, metavar="URL", help=f"default {DEFAULT_SERVER}")
    group.add_argument("--base_url", type=server_url, metavar="URL", help="the same, by the name OpenAI's packages give it; ends in /v1")
    group.add_argument(
        "-ep", "--endpoint_name", default="mixtral_chat", metavar="NAME", help="the model id to ask for; default %(default)s"
    )
    group.add_argument("-k", "--api_key", metavar="KEY", help="a client key; default the environment's MIXTRAL_CLIENT_KEY")
    group.add_argument(
        "--api",
        choices=("openai", "native", "aime"),
        help="openai: /v1/chat/completions; native: /v1/jobs, with the server's own timings; aime: AIME's wire, polled; default openai",
    )
    group.add_argument("--verify", action="store_true", help="compare each stream with the server's log of its job; the API is then native")


def _add_load(group: _Group) -> None:
    group.add_argument(
        "-tr", "--total_requests", type=_count, metavar="N", help=f"chats in all; default {DEFAULT_REQUESTS}; of a trace all"
    )
    group.add_argument(
        "-cr",
        "--concurrent_requests",
        type=_count,
        metavar="N",
        help=f"chats at once; default {DEFAULT_CONCURRENCY}, with --request_rate no cap",
    )
    group.add_argument("--request_rate", type=_positive, metavar="PER_S", help="open loop: begin this many chats a second")
    group.add_argument(
        "--burstiness",
        type=_burstiness,
        default=1.0,
        metavar="B",
        help="shape of the gaps' gamma distribution: 1 random (Poisson), below 1 in bursts, `constant` even; default 1",
    )
    group.add_argument("--ramp_to", type=_positive, metavar="PER_S", help="the rate goes from --request_rate to this over the run")
    group.add_argument("--trace", type=Path, metavar="JSONL", help="open loop: moments, prompts and lengths of a recorded load")
    group.add_argument("--trace_speed", type=_positive, default=1.0, metavar="X", help="replay so many times as fast; default 1")
    group.add_argument(
        "--sweep_concurrency",
        type=levels,
        nargs="?",
        const=DEFAULT_CONCURRENCY_SWEEP,
        metavar="N,N,…",
        help="one run after another with so many chats at once, until more bring no more; default 1,2,4 … 256",
    )
    group.add_argument(
        "--sweep_rate",
        type=_rates,
        nargs="?",
        const=DEFAULT_RATE_SWEEP,
        metavar="R,R,…",
        help="the same over rates, until the server falls behind; default 0.5,1,2 … 64",
    )
    group.add_argument(
        "--chaos",
        action="store_true",
        help="start two replicas and two workers with the demo model here, and kill one after another while the load runs",
    )
    group.add_argument("--chaos_every_s", type=_positive, default=15.0, metavar="S", help="between two kills; default %(default)g")
    group.add_argument(
        "--warmup_requests",
        type=_count_or_zero,
        default=1,
        metavar="N",
        help="chats before the clock starts, not counted; default %(default)s",
    )
    group.add_argument(
        "--timeout_s", type=_positive, default=600, metavar="S", help="a chat not finished by then has failed; default %(default)s"
    )


def _add_chat(group: _Group) -> None:
    group.add_argument("--prompt", metavar="TEXT", help=f"default {START_PROMPT!r}")
    group.add_argument("--prompt_file", type=Path, metavar="JSONL", help="a line a chat: prompt, turns or messages; over again at its end")
    group.add_argument(
        "--context_length",
        type=_tokens,
        metavar="N",
        help="a long text for each chat, that fills so many tokens with its answer",
    )
    group.add_argument("--input_tokens", type=_tokens, metavar="N", help="random words, so many tokens as the server counts")
    group.add_argument("--input_spread", type=_share, default=0.0, metavar="SHARE", help="lengths drawn evenly from N·(1 ± SHARE)")
    group.add_argument("--shared_prefix_tokens", type=_count_or_zero, default=0, metavar="N", help="so many of them begin several chats")
    group.add_argument("--prefixes", type=_count, default=1, metavar="N", help="different beginnings, dealt out in turn; default 1")
    group.add_argument("--turns", type=_count, default=1, metavar="N", help="turns of each chat; the later ones ask to go on")
    group.add_argument("--think_s", type=_duration, default=0.0, metavar="S", help="between an answer's end and the next turn; default 0")
    group.add_argument(
        "-nu", "--max_tokens", "--num_units", type=_count, default=500, metavar="N", help="most tokens to generate; default %(default)s"
    )
    group.add_argument("--ignore_eos", action="store_true", help="every answer is exactly --max_tokens long (not a field of OpenAI's own)")
    group.add_argument("--temperature", type=_temperature, metavar="T", help="0 is greedy; default the endpoint's own")
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="chat i draws with seed N+i, and random words and moments with N; default: the server draws, words and moments with 0",
    )


def _add_output(group: _Group) -> None:
    group.add_argument(
        "--slo",
        type=_goal,
        nargs="+",
        default=(),
        metavar="NAME:MS",
        help=f"goals that make a chat good: {', '.join(MEASURES)}; failures are never good",
    )
    group.add_argument("--json_file", type=Path, metavar="PATH", help="also write the JSON object, with a row per chat, to this file")
    group.add_argument("--csv_file", type=Path, metavar="PATH", help="also write a row per chat as CSV")
    group.add_argument("--html_file", type=Path, metavar="PATH", help="also write one self-contained page with plots")


def parse(argv: Sequence[str] | None, environment: Mapping[str, str]) -> tuple[Flags, Target]:
    """Flags and where they go. Leaves by SystemExit(2) with a sentence when they contradict each other."""
    reader = parser()
    given = reader.parse_args(argv)
    if conflict := _conflict(given):
        reader.error(conflict)
    values = {name: value for name, value in vars(given).items() if name not in ("api_key", "base_url")}
    values |= {"api": given.api or ("native" if given.verify or given.chaos else "openai"), "slo": tuple(given.slo)}
    values["api_server"] = given.base_url or given.api_server or DEFAULT_SERVER
    if not _set_of(given, *TEXTS):
        values["prompt"] = START_PROMPT
    if given.trace is None and given.total_requests is None:
        values["total_requests"] = DEFAULT_REQUESTS
    flags = Flags(**values)
    if not flags.is_open_loop and not flags.sweep_rate and flags.concurrent_requests is None:
        flags = replace(flags, concurrent_requests=DEFAULT_CONCURRENCY)
    return flags, Target(flags.api_server, flags.endpoint_name, given.api_key or environment.get("MIXTRAL_CLIENT_KEY"))


def _conflict(given: argparse.Namespace) -> str | None:
    """The first of the contradictions, as a sentence."""
    texts, paces = _set_of(given, *TEXTS), _set_of(given, *PACES)
    rules = {
        "--verify compares native streams with the log of their job; leave out --api": given.verify and given.api not in (None, "native"),
        "--chaos starts a server of its own; leave out --api_server, --base_url and --api_key": given.chaos
        and bool(given.api_server or given.base_url or given.api_key),
        "--chaos reads every stream with the client that resumes; leave out --api": given.chaos and given.api not in (None, "native"),
        "--chaos is one run; leave out the sweep": given.chaos and bool(given.sweep_concurrency or given.sweep_rate),
        f"{' and '.join(texts)} each say what to ask; give one": len(texts) > 1,
        f"{' and '.join(paces)} each say when to send; give one": len(paces) > 1,
        "--sweep_concurrency sets how many chats run at once; leave out --concurrent_requests": given.sweep_concurrency
        and given.concurrent_requests,
        "--ramp_to needs --request_rate, the rate to begin with": given.ramp_to and given.request_rate is None,
        "--burstiness needs --request_rate or --sweep_rate": given.burstiness != 1 and not (given.request_rate or given.sweep_rate),
        "--shared_prefix_tokens needs --input_tokens, and fewer": given.shared_prefix_tokens
        and given.shared_prefix_tokens >= (given.input_tokens or 0),
        "--prefixes needs --shared_prefix_tokens": given.prefixes > 1 and not given.shared_prefix_tokens,
        "--input_spread needs --input_tokens": given.input_spread and not given.input_tokens,
        f"--context_length {given.context_length} leaves no room for a prompt beside --max_tokens {given.max_tokens}": given.context_length
        and given.context_length <= given.max_tokens,
        "AIME's wire has no seed; leave out --seed": given.api == "aime" and given.seed is not None,
        "AIME's wire has no ignore_eos; leave out --ignore_eos": given.api == "aime" and given.ignore_eos,
        "AIME's wire takes temperatures up to 1": given.api == "aime" and (given.temperature or 0) > 1,
    }
    for name in ("json_file", "csv_file", "html_file"):
        path = getattr(given, name)
        rules[f"--{name}: the folder {path and path.parent} does not exist; make it first"] = path and not path.parent.is_dir()
    return next((sentence for sentence, is_broken in rules.items() if is_broken), None)


def _set_of(given: argparse.Namespace, *names: str) -> list[str]:
    """Those of the flags that were given."""
    return [f"--{name}" for name in names if getattr(given, name) is not None]
