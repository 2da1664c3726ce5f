"""What holds for every test: missing parts are named once, in one sentence each, as the last thing that a run prints; Ctrl-C is Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest

from support.parts import PartMissing

if "MIXTRAL_TEST_GPU" not in os.environ:
    # Kernels of cards run in Triton's interpreter then. It must be set before anybody, transformers for one, imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore = [] if "MIXTRAL_TEST_GPU" in os.environ else ["gpu"]  # make test-gpu sets it

_missing = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_missing] = set()
    # A shell starts background commands with SIGINT ignored, and every program that a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo and call.excinfo.errisinstance(PartMissing):
        item.config.stash[_missing].add(str(call.excinfo.value))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for sentence in sorted(config.stash[_missing]):
        terminalreporter.write_line(f"not everything could be tested: {sentence}", red=True)
