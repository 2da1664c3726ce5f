"""A worker process whose model is a hash. Link, step loop, batch, scheduler, detokenizer, watchdog and signals are the real ones.

MIXTRAL_WORKER_KEY=… python -m support.toy_worker --api_server http://127.0.0.1:7777 --slots 8 --token_ms 20
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any, cast

from mixtral_client.protocol import PROTOCOL_VERSION, SessionRequest
from mixtral_worker.settings import KEY_VARIABLE
from mixtral_worker.telemetry import LOG
from mixtral_worker.watchdog import Signals, Watchdog

MAX_SEQ_LEN = 1024
NUM_BLOCKS = 2048


class Alone:
    """One rank."""

    def share(self, plan: Any, codec: object) -> Any:
        return plan


def main(arguments: list[str]) -> int:
    flags = argparse.ArgumentParser()
    flags.add_argument("--api_server", required=True)
    flags.add_argument("--endpoint", default="mixtral_chat")
    flags.add_argument("--name", default="toy")
    flags.add_argument("--slots", type=int, default=8)
    flags.add_argument("--token_ms", type=float, default=10.0)
    flags.add_argument("--poison", default="")
    given = flags.parse_args(arguments)
    told = logging.StreamHandler(sys.stderr)
    told.setFormatter(logging.Formatter("time=%(created).3f %(message)s"))
    LOG.addHandler(told)
    LOG.setLevel("INFO")
    return serve(given, Signals())


def serve(given: argparse.Namespace, signals: Signals) -> int:
    from mixtral_worker.blocks import BlockPool  # here, because numpy's threads must block the signals too
    from mixtral_worker.link import Link, LinkRefused
    from mixtral_worker.loop import Batch, Crew, run_leader
    from mixtral_worker.scheduler import Scheduler
    from support.toy_model import FORMAT, ToyEngine, ToyTokenizer

    watchdog = Watchdog(0, limit_s=60.0)
    engine = cast(Any, ToyEngine(NUM_BLOCKS, given.token_ms / 1000, given.poison))
    batch = Batch(Scheduler(given.slots, BlockPool(NUM_BLOCKS), MAX_SEQ_LEN), ToyTokenizer(), FORMAT)
    crew = Crew(engine, cast(Any, Alone()), cast(Any, None), watchdog)
    login = SessionRequest(
        endpoint=given.endpoint,
        name=given.name,
        protocol=PROTOCOL_VERSION,
        version="toy",
        model="toy",
        device="cpu",
        max_slots=given.slots,
        max_seq_len=MAX_SEQ_LEN,
    )
    watchdog.start()
    signals.serve(watchdog)
    try:
        run_leader(batch, crew, Link(given.api_server, os.environ[KEY_VARIABLE], login), lambda: signals.received)
    except LinkRefused as refused:
        print(f"toy_worker: {refused}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
