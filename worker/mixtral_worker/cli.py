"""Entry of `torchrun worker`: flags → Settings → startup, or one of the sub-commands bench, capacity, export, flips and perplexity.

Decides who speaks (help: rank 0; logs: rank 0; errors: the first rank of a host) and with which code a rank ends: 0 after an orderly stop,
2 for settings or a checkpoint that cannot work, 1 for everything else. Imports torch only once the settings hold.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from mixtral_worker.settings import Settings, SettingsRefused, parse
from mixtral_worker.telemetry import LOG, line
from mixtral_worker.watchdog import Signals, end_with_torchrun

FAILED, WRONG_SETTINGS = 1, 2
SPEAKER_WITHIN_S = 10.0  # of the others, should the one that speaks never come to it


def main() -> None:
    rank, argv = int(os.environ.get("RANK", "0")), sys.argv[1:]
    if argv[:1] == ["capacity"]:
        from mixtral_worker import capacity_cli

        sys.exit(0 if rank else capacity_cli.main(argv[1:]))
    if argv[:1] == ["export"]:
        from mixtral_worker import export

        sys.exit(0 if rank else export.main(argv[1:]))
    end_with_torchrun()
    if rank and {"-h", "--help"} & set(argv):
        sys.exit(0)
    if argv[:1] == ["perplexity"]:
        _perplexity(rank, argv[1:])
    if argv[:1] == ["bench"]:
        _bench(rank, argv[1:])
    measures_flips = argv[:1] == ["flips"]
    try:
        settings = parse(argv[1:] if measures_flips else argv, os.environ)
    except SettingsRefused as refused:
        _refuse(refused, WRONG_SETTINGS)
    if measures_flips:
        _flips(rank, settings)
    signals = Signals()  # before torch, whose threads must block the signals too
    _log_to_stderr(settings.log_level.upper() if rank == 0 else "ERROR", rank)
    LOG.info(line("starting", ckpt_dir=settings.ckpt_dir, ranks=os.environ.get("WORLD_SIZE", "1"), pid=os.getpid()))

    _let_threads_sleep()
    from mixtral_worker import startup

    _end_with(lambda: startup.run(settings, signals), rank)


def _perplexity(rank: int, argv: Sequence[str]) -> NoReturn:
    from mixtral_worker import perplexity_cli

    try:
        asked = perplexity_cli.parse(argv)
    except SettingsRefused as refused:
        _refuse(refused, WRONG_SETTINGS)
    _log_to_stderr("WARNING" if rank == 0 else "ERROR", rank)
    _let_threads_sleep()
    from mixtral_worker import perplexity_report

    _end_with(lambda: perplexity_report.run(asked), rank)


def _flips(rank: int, settings: Settings) -> NoReturn:
    _log_to_stderr("WARNING" if rank == 0 else "ERROR", rank)
    _let_threads_sleep()
    from mixtral_worker import flips

    _end_with(lambda: flips.run(settings), rank)


def _bench(rank: int, argv: Sequence[str]) -> NoReturn:
    from mixtral_worker import bench_cli

    try:
        asked = bench_cli.parse(argv, int(os.environ.get("WORLD_SIZE", "1")), _has_card)
    except SettingsRefused as refused:
        _refuse(refused, WRONG_SETTINGS)
    _log_to_stderr("WARNING", rank)
    from mixtral_worker import bench

    _end_with(lambda: bench.run(asked), rank)


def _has_card() -> bool:
    import torch  # here, for it takes seconds

    return torch.cuda.is_available()


def _let_threads_sleep() -> None:
    # On a busy CPU, threads that spin at every barrier of a step wait for one that does not get to run. Measured on 2 cores at a load of
    # 7 with 16 chats of the demo model: 2 to 10 s a step; with threads that sleep, 0.05 s. Read when torch is loaded, hence before it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _end_with(work: Callable[[], int], rank: int) -> NoReturn:
    """Run this rank to its end; what refuses or breaks it decides the code."""
    from mixtral_worker import startup

    try:
        _end(work())
    except startup.REFUSALS as refused:
        _refuse(refused, WRONG_SETTINGS)
    except startup.LinkRefused as refused:
        _refuse(refused, FAILED)
    except startup.RankEnded:
        _end(FAILED)
    except Exception:  # noqa: BLE001 - logged with its traceback, and this rank's end ends the others
        LOG.exception(line("rank_failed", rank=rank))
        _end(FAILED)
    except KeyboardInterrupt:
        _end(FAILED)


def _refuse(error: Exception, code: int) -> NoReturn:
    """One sentence, from one process of each host; the others wait for it, because torchrun ends all as soon as the first has ended."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"mixtral-worker: {error}", file=sys.stderr)
    else:
        time.sleep(SPEAKER_WITHIN_S)
    _end(code)


def _end(code: int) -> NoReturn:
    """End now: an ordinary exit would wait for collectives that other ranks may never join."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _log_to_stderr(level: str, rank: int) -> None:
    form = logging.Formatter(
        f"%(asctime)s.%(msecs)03dZ level=%(levelname)s {f'rank={rank} ' if rank else ''}%(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    form.converter = time.gmtime
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(form)
    LOG.addHandler(out)
    LOG.setLevel(level)
    LOG.propagate = False
