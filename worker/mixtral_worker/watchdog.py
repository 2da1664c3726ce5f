"""What ends a process from outside its step loop: a signal that asks for it, the end of its torchrun, or a step that never returns.

Decides how both are noticed while the main thread sits in a collective or a kernel, where no Python signal handler would run. Leaves to
loop.py what a stop means for the running jobs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

from mixtral_worker.telemetry import LOG, line

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
STOPPING_STEP_LIMIT_S = 8.0  # torchrun sends SIGTERM also when another rank died: then the step we are in will not return
CHECK_EVERY_S = 0.25
PR_SET_PDEATHSIG = 1


def end_with_torchrun() -> None:
    """Ask Linux for SIGTERM when the torchrun that started this rank is gone without having ended it, as after kill -9: nobody would end or
    restart the rank any more, and it would hold its GPU. Elsewhere an operator has to."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Watchdog:
    """Ends this process, non-zero, when the step loop has not moved for limit_s; that ends the other ranks too."""

    def __init__(self, rank: int, limit_s: float) -> None:
        self.limit_s = limit_s
        self._rank = rank
        self.step = 0
        self._moved_s = time.monotonic()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        self.step, self._moved_s = step, time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(CHECK_EVERY_S)
            still_s = time.monotonic() - self._moved_s
            if still_s > self.limit_s:
                LOG.critical(line("step_hung", rank=self._rank, after_step=self.step, for_s=still_s, limit_s=self.limit_s, then="ending"))
                os._exit(1)


class Signals:
    """SIGTERM, SIGINT and SIGHUP as something to ask for. Construct before any other thread starts, so that every thread blocks them."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._watchdog: Watchdog | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def serve(self, watchdog: Watchdog) -> None:
        """From now on a signal asks the step loop to stop; before, while there is no job to lose, it ends the process."""
        self._watchdog = watchdog

    def _wait(self) -> None:
        while True:
            number = signal.Signals(signal.sigwait(STOP_SIGNALS))
            if self._watchdog is None:
                os._exit(0)
            self._watchdog.limit_s = min(self._watchdog.limit_s, STOPPING_STEP_LIMIT_S)
            self.received = number
