"""Ends that no Python code of the step loop takes part in: a step that never returns, a signal during one."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

LIMIT_S = 60

# A lock that nobody releases stands for a collective whose peer is gone: the main thread sits in C code and no signal handler can run.
STUCK = """
import logging, sys, threading
logging.basicConfig(format="%(message)s", stream=sys.stderr)
from mixtral_worker import watchdog
stuck = threading.Lock()
stuck.acquire()
"""


def start(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STUCK + textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_step_that_never_returns_ends_the_process_non_zero_and_names_rank_and_step() -> None:
    process = start("""
        dog = watchdog.Watchdog(rank=3, limit_s=0.5)
        dog.start()
        dog.beat(17)
        stuck.acquire()
    """)
    _, log = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "event=step_hung rank=3 after_step=17" in log


def test_a_process_that_beats_lives_past_the_limit() -> None:
    process = start("""
        dog = watchdog.Watchdog(rank=0, limit_s=0.6)
        dog.start()
        for step in range(30):
            dog.beat(step)
            stuck.acquire(timeout=0.05)
        print("lived")
    """)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (0, "lived\n")


def test_before_there_are_jobs_a_signal_ends_the_process_at_once_and_orderly() -> None:
    process = start("""
        watchdog.Signals()
        print("loading", flush=True)
        stuck.acquire()
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0


def test_a_signal_while_serving_is_noted_and_the_step_loop_goes_on() -> None:
    process = start("""
        signals = watchdog.Signals()
        dog = watchdog.Watchdog(rank=0, limit_s=3600)
        dog.start()
        signals.serve(dog)
        print("serving", flush=True)
        while signals.received is None:
            dog.beat(1)
            stuck.acquire(timeout=0.05)
        print(signals.received.name, dog.limit_s)
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "serving\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (0, "SIGINT 8.0\n")


def test_a_signal_during_a_step_that_never_returns_shortens_the_wait_for_it() -> None:
    process = start("""
        watchdog.STOPPING_STEP_LIMIT_S = 0.5
        signals = watchdog.Signals()
        dog = watchdog.Watchdog(rank=0, limit_s=3600)
        dog.start()
        signals.serve(dog)
        print("serving", flush=True)
        stuck.acquire()
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "serving\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
