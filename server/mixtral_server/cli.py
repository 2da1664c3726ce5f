"""`mixtral-server`, `python -m server`: flags and environment → Settings → a running server; also `keys`, `dead` and `migrate`.

Decides what an operator types and reads. Leaves every knob to settings.py and running to app.py.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from mixtral_server.accounts import Accounts, KeyNotFound
from mixtral_server.apikeys import SCOPES, ApiKey, KeyLimits
from mixtral_server.app import Started, StartError
from mixtral_server.database import Database, DatabaseError, SchemaError, first_line
from mixtral_server.dead_cli import add_dead_commands, run_dead
from mixtral_server.endpoints import BUILT_IN, EndpointConfig, EndpointError, read_endpoints
from mixtral_server.errors import ServiceError
from mixtral_server.process import log_to_stderr, run_process, tell_first_keys
from mixtral_server.routes.pages import page_folder
from mixtral_server.settings import SettingError, Settings, knobs, load_settings, shipped
from mixtral_server.supervisor import ProcessFailed, supervise

log = logging.getLogger(__name__)

MOST_A_MINUTE = 10**9

ABOUT = """\
The server of Mixtral chat: takes chats over HTTP, queues them in Redis, hands them to workers, streams the answers.

With no command it serves. The first start makes one client, one worker and one admin key and writes them to DATA_DIR/keys.env.
Every flag can also be set as MIXTRAL_<NAME> in the environment or in a .env file; a flag wins over the environment, and that over .env."""

EXAMPLES = """\
examples:
  mixtral-server                                       on 127.0.0.1:7777, with a Redis and a SQLite of its own in ./data
  mixtral-server --host 0.0.0.0 --redis_url redis://queue:6379/0 --database_url postgresql+asyncpg://mixtral@db/mixtral
  mixtral-server keys create --user alice --scope client
  mixtral-server keys set mx-c-3fQ9aZ --requests_per_minute 60 --tokens_per_minute 20000
  mixtral-server keys revoke mx-c-3fQ9aZ

docs/configuration.md tells more of every setting."""


def main(arguments: Sequence[str] | None = None) -> None:
    flags = _parser().parse_args(arguments)
    try:
        settings = load_settings(_given(flags), os.environ, Path(".env"))
        if flags.command is None:
            log_to_stderr(settings.log_level)
        endpoints = _endpoints(settings)
    except (SettingError, EndpointError) as error:
        _end(f"mixtral-server: {error}", 2)
    try:
        if flags.command is None:
            asyncio.run(_serve(settings, endpoints))
        else:
            _maintain(settings, endpoints, flags)
    except ProcessFailed as error:
        sys.exit(error.code)
    except (StartError, SchemaError, KeyNotFound) as error:
        _end(f"mixtral-server: {error}", 1)
    except ServiceError as error:
        _end(f"mixtral-server: {error.message}", 1)


def _maintain(settings: Settings, endpoints: Mapping[str, EndpointConfig], flags: argparse.Namespace) -> None:
    if flags.command == "dead":
        sys.exit(asyncio.run(run_dead(settings, endpoints, flags)))
    try:
        asyncio.run(_keys(settings, flags) if flags.command == "keys" else _migrate(settings))
    except DatabaseError as error:
        _end(f"mixtral-server: the database cannot be used: {first_line(error)}", 1)


def _end(sentence: str, code: int) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------- flags


def _parser() -> argparse.ArgumentParser:
    table = _settings_flags()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="mixtral-server", description=ABOUT, epilog=EXAMPLES, formatter_class=form, parents=[table], allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=version("mixtral-chat"))
    commands = parser.add_subparsers(dest="command", metavar="{keys,dead,migrate}", title="commands (none: serve)")
    commands.add_parser("migrate", help="bring the database's tables up to date", parents=[table], allow_abbrev=False)
    keys = commands.add_parser("keys", help="list, create, change or revoke API keys", allow_abbrev=False)
    acts = keys.add_subparsers(dest="act", required=True)
    listing = acts.add_parser("list", help="every key by its visible prefix", parents=[table], allow_abbrev=False)
    listing.add_argument("--all", action="store_true", help="revoked keys too")
    create = acts.add_parser("create", help="make a key and show it once", parents=[table], allow_abbrev=False)
    create.add_argument("--user", default="operator", help="whose key it is; users share the queue fairly (%(default)s)")
    create.add_argument("--name", default="", help="what you call it (the scopes)")
    create.add_argument("--scope", action="append", required=True, choices=SCOPES, help="what it may do; may be given several times")
    create.add_argument("--endpoint", action="append", default=[], help="for this endpoint alone; may be given several times")
    _limit_flags(create)
    change = acts.add_parser("set", help="change a key's limits, everywhere within 5 s", parents=[table], allow_abbrev=False)
    change.add_argument("key", help="its id, its visible prefix or its name, as `keys list` shows them")
    _limit_flags(change)
    revoke = acts.add_parser("revoke", help="end a key; every server refuses it within 5 s", parents=[table], allow_abbrev=False)
    revoke.add_argument("key", help="its id, its visible prefix or its name, as `keys list` shows them")
    add_dead_commands(commands, table)
    return parser


def _limit_flags(parser: argparse.ArgumentParser) -> None:
    """The limits of a key; one that is not given stays as it is."""
    for name, what in (
        ("requests_per_minute", "chats it may start a minute at each endpoint"),
        ("tokens_per_minute", "tokens, of prompts and answers, it may use a minute at each endpoint"),
        ("max_running", "jobs of it that run at once at each endpoint; more wait"),
    ):
        help_text = f"{what}; 0 is no limit, `default` what the endpoint says (default)"
        parser.add_argument(f"--{name}", type=_limit, default=argparse.SUPPRESS, metavar="N", help=help_text)
    parser.add_argument(
        "--priority", type=int, choices=range(10), default=argparse.SUPPRESS, help="the best its jobs may have; 0 is served first (0)"
    )
    parser.add_argument("--weight", type=_weight, help="its user's share of the queue against other users' (1)")


def _limit(text: str) -> int | None:
    if text == "default":
        return None
    if not (text.isdecimal() and int(text) <= MOST_A_MINUTE):
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 to {MOST_A_MINUTE:,}, or `default`; got {text!r}")
    return int(text)


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0.001 <= weight <= 1000:  # NaN fails too
        raise argparse.ArgumentTypeError(f"must be a number of 0.001 to 1,000; got {text!r}")
    return weight


def _settings_flags() -> argparse.ArgumentParser:
    """One flag for each knob. Values stay text here: settings.py reads and judges flags, variables and .env alike."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("settings")
    for name, knob in knobs().items():
        default = Settings.__dataclass_fields__[name].default
        unit = f" {knob.unit}" if knob.unit else ""
        limits = f"; {knob.limits}" if knob.limits else ""
        shown = f" ({'on' if default is True else 'off' if default is False else default if default != '' else 'empty'}{unit}{limits})"
        text = (knob.sentence + shown).replace("%", "%%")
        if isinstance(default, bool):
            group.add_argument(f"--{name}", nargs="?", const="true", default=argparse.SUPPRESS, metavar="true|false", help=text)
        else:
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=(knob.unit or name).upper(), help=text)
    return parser


def _given(flags: argparse.Namespace) -> dict[str, str]:
    return {name: value for name, value in vars(flags).items() if name in knobs()}


def _endpoints(settings: Settings) -> Mapping[str, EndpointConfig]:
    folder = Path(settings.endpoint_dir) if settings.endpoint_dir else shipped("server/endpoints", "endpoints")
    if not settings.endpoint_dir and not folder.is_dir():
        return {BUILT_IN.name: BUILT_IN}
    return read_endpoints(folder)


# ---------------------------------------------------------------------------------------------- commands


async def _serve(settings: Settings, endpoints: Mapping[str, EndpointConfig]) -> None:
    if settings.public_page and not settings.is_page_public:
        log.warning(
            "event=public_page_refused host=%s why=not_loopback: the page asks for a key; "
            "say --public_page_on_public_host as well to let anyone who reaches this host chat",
            settings.host,
        )
    if not (page_folder(settings) / "index.html").is_file():
        log.warning("event=page_missing folder=%s: / answers 404; name the page's folder with --frontend_dir", page_folder(settings))
    if settings.processes > 1:
        await supervise(settings, endpoints, lambda started: _announce(settings, started))
    else:
        await run_process(settings, endpoints, lambda started: _announce(settings, started))


def _announce(settings: Settings, started: Started) -> None:
    tell_first_keys(settings, started)
    processes = f" with {settings.processes} processes" if settings.processes > 1 else ""
    print(f"mixtral-server listens on {started.url}{processes}", flush=True)
    log.info("event=started host=%s port=%d public_page=%s", started.host, started.port, str(settings.is_page_public).lower())


async def _migrate(settings: Settings) -> None:
    database = _database(settings)
    try:
        before, now = await database.migrate()
    finally:
        await database.close()
    print(f"database at revision {now}" + (", as before" if before == now else f", from {before or 'empty'}"))


async def _keys(settings: Settings, flags: argparse.Namespace) -> None:
    database = _database(settings)
    try:
        await database.make_ready()
        accounts = Accounts(database)
        match flags.act:
            case "list":
                await _list_keys(accounts, flags.all)
            case "create":
                await _create_key(accounts, flags)
            case "set":
                key = await accounts.set_key(flags.key, _limits(flags), flags.weight)
                print(f"{key.prefix}… ({key.name} of {key.user}): {_shown(key)}; every server holds to it within 5 s")
            case "revoke":
                key = await accounts.revoke_key(flags.key, time.time())
                print(f"revoked {key.prefix}… ({key.name} of {key.user}); every server refuses it within 5 s")
    finally:
        await database.close()


async def _list_keys(accounts: Accounts, with_revoked: bool) -> None:
    row = "{:<17}  {:<11}  {:<20}  {:<16}  {:<20}  {:<16}  {:<44}  {}"
    print(row.format("id", "prefix", "name", "user", "scopes", "created", "limits", "endpoints"))
    for key in await accounts.keys(with_revoked):
        created = time.strftime("%Y-%m-%d %H:%M", time.gmtime(key.created_s))
        endpoints = " ".join(sorted(key.endpoints)) or "all"
        revoked = "  revoked" if key.revoked_s is not None else ""
        print(row.format(key.id, key.prefix, key.name, key.user, " ".join(sorted(key.scopes)), created, _shown(key), endpoints) + revoked)


def _limits(flags: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    return {name: getattr(flags, name) for name in KeyLimits.__dataclass_fields__ if hasattr(flags, name)}


def _shown(key: ApiKey) -> str:
    """What it is held to: limits of its own, then weight."""
    limits = key.limits
    words = {"requests/min": limits.requests_per_minute, "tokens/min": limits.tokens_per_minute, "running": limits.max_running}
    own = [f"{'unlimited' if number == 0 else number} {what}" for what, number in words.items() if number is not None]
    return ", ".join([*own, *([f"priority {limits.priority}+"] if limits.priority else []), f"weight {key.weight:g}"])


async def _create_key(accounts: Accounts, flags: argparse.Namespace) -> None:
    scopes = list(dict.fromkeys(flags.scope))
    secret = await accounts.create_key(
        user=flags.user,
        name=flags.name or " ".join(scopes),
        scopes=scopes,
        endpoints=flags.endpoint,
        weight=flags.weight,
        limits=KeyLimits(**_limits(flags)),
        now_s=time.time(),
    )
    print(secret)


def _database(settings: Settings) -> Database:
    settings.data_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Database(settings.sql_url)
