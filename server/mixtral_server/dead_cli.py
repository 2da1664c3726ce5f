"""`mixtral-server dead`: list, show, retry or drop jobs that were given up.

Decides what an operator types and reads. Leaves what is done to dead.py. What a user wrote and was told is shown only where --text asks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mixtral_client.protocol import JobSpec
from mixtral_server.dead import DeadLetter, DeadLetters, Remains
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import JobNotFound
from mixtral_server.records import JobContent, Parameters
from mixtral_server.redis_server import open_redis
from mixtral_server.settings import Settings


def add_dead_commands(commands: Any, settings: argparse.ArgumentParser) -> None:
    """`dead` and what may follow it. settings: the flags that every command takes."""
    dead = commands.add_parser("dead", help="list, show, retry or drop jobs that were given up", allow_abbrev=False)
    acts = dead.add_subparsers(dest="act", required=True)
    listing = acts.add_parser("list", help="newest first", parents=[settings], allow_abbrev=False)
    listing.add_argument("--count", type=int, default=1_000, help="at most so many of each endpoint (%(default)s)")
    show = acts.add_parser("show", help="one job: what it asked, as numbers, and how far it came", parents=[settings], allow_abbrev=False)
    show.add_argument("job", help="its id")
    show.add_argument("--text", action="store_true", help="also what its user wrote and was told")
    for act, what in (
        ("retry", "let jobs run again, each from the token it had come to"),
        ("drop", "forget jobs, requests and answers too"),
    ):
        parser = acts.add_parser(act, help=what, parents=[settings], allow_abbrev=False)
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("job", nargs="*", default=[], help="their ids")
        which.add_argument("--all", action="store_true", help="every job that was given up, the oldest first")
        parser.add_argument("--count", type=int, default=1_000, help="with --all: at most so many of each endpoint (%(default)s)")
    for parser in acts.choices.values():
        parser.add_argument("--endpoint", help="of this endpoint alone")
        parser.add_argument("--json", action="store_true", help="print JSON")


async def run_dead(settings: Settings, endpoints: Mapping[str, EndpointConfig], flags: argparse.Namespace) -> int:
    """The exit code: 1 when some job that was named could not be dealt with. Raises ServiceError."""
    if flags.endpoint is not None and flags.endpoint not in endpoints:
        print(f"mixtral-server: there is no endpoint {flags.endpoint!r}; known are {', '.join(sorted(endpoints))}", file=sys.stderr)
        return 1
    names = [flags.endpoint] if flags.endpoint is not None else sorted(endpoints)
    async with open_redis(settings.redis_url, settings.data_path) as redis:
        dead = DeadLetters(redis, endpoints.keys())
        match flags.act:
            case "list":
                _print_list([letter for name in names for letter in await dead.list(name, flags.count)], flags.json)
            case "show":
                _print_remains(await dead.show(flags.job), flags)
            case _:
                jobs = flags.job
                if flags.all:
                    letters = [letter for name in names for letter in reversed(await dead.list(name))][: flags.count]
                    jobs = [letter.job_id for letter in letters if flags.act == "drop" or letter.tokens is not None]
                return await _each(dead, flags, jobs)
    return 0


async def _each(dead: DeadLetters, flags: argparse.Namespace, jobs: list[str]) -> int:
    """Retry or drop them."""
    done, refused = [], {}
    for job in jobs:
        try:
            state = await dead.retry(job) if flags.act == "retry" else "dead" if await dead.drop(job) else "not dead"
        except JobNotFound as error:
            refused[job] = error.message
            continue
        if state == "dead":
            done.append(job)
        else:
            refused[job] = f"job {job} is {state}; only a job that was given up can be {_DONE[flags.act]}"
    if flags.json:
        print(json.dumps({_DONE[flags.act]: done, "refused": refused}))
    else:
        for sentence in refused.values():
            print(f"mixtral-server: {sentence}", file=sys.stderr)
        print(f"{_DONE[flags.act]} {len(done):,} of {len(jobs):,} jobs")
    return 1 if refused else 0


_DONE = {"retry": "retried", "drop": "dropped"}


def _print_list(letters: list[DeadLetter], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(letter) for letter in letters]))
        return
    row = "{:<50}  {:>9}  {:<18}  {:<20}  {:>6}  {}"
    print(row.format("job", "age", "owner", "last worker", "tokens", "reason"))
    for one in letters:
        tokens = "gone" if one.tokens is None else one.tokens
        print(row.format(one.job_id, age(one.age_s), one.owner, one.worker[:20], tokens, one.reason))


def _print_remains(job: Remains, flags: argparse.Namespace) -> None:
    shown = shape_of(job)
    if flags.text:
        shown |= {"request": words_of(job.spec), "answer": job.text}
    if flags.json:
        print(json.dumps(shown))
        return
    for name, value in shown.items():
        print(f"{name:<14}  {value if not isinstance(value, list) else ', '.join(map(str, value))}")


def words_of(spec: JobContent) -> list[str]:
    """What it asked."""
    if isinstance(spec, Parameters):
        return [f"{name}: {value}" for name, value in spec.parameters.items()]
    return [f"{one.role}: {one.content}" for one in spec.messages] if spec.messages is not None else [str(spec.prompt)]


def shape_of(job: Remains) -> dict[str, Any]:
    """What it asked and how far it came, without a word of it."""
    spec = job.spec
    shape: dict[str, Any] = {
        "job": job.job_id,
        "state": job.state,
        "created": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(job.created)),
        "priority": job.priority,
        "attempts": job.attempts,
        "deaths": job.deaths,
    }
    shape |= _shape_of_parameters(spec) if isinstance(spec, Parameters) else _shape_of_chat(spec)
    return shape | {"log": f"{len(job.ids):,} tokens, {len(job.text):,} characters", "last ids": list(job.ids[-10:])}


def _shape_of_parameters(spec: Parameters) -> dict[str, Any]:
    return {"request": [f"{name} of {len(str(value)):,} characters" for name, value in spec.parameters.items()]}


def _shape_of_chat(spec: JobSpec) -> dict[str, Any]:
    if spec.messages is not None:
        request = [f"{one.role} of {len(one.content):,} characters" for one in spec.messages[:20]]
        request += [f"{len(spec.messages) - 20:,} messages more"] if len(spec.messages) > 20 else []
    else:
        kind = "characters" if isinstance(spec.prompt, str) else "token ids"
        request = [f"prompt of {len(spec.prompt or ''):,} {kind}"]
    return {
        "request": request,
        "max_tokens": spec.max_tokens,
        "stop": len(spec.stop),
        "sampling": ", ".join(
            f"{name} {value if isinstance(value, bool | int | float) else f'of {len(value)}'}"
            for name, value in spec.sampling.model_dump(exclude_none=True).items()
            if isinstance(value, bool | int | float | dict | list)
        ),
        "seed": spec.seed,
    }


def age(seconds: float) -> str:
    """12 s, 5 min, 3.5 h, 2.0 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86_400 else f"{seconds / 86_400:.1f} days"
