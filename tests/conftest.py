"""What holds for every test: missing parts are named once, in one sentence each, as the last thing that a run prints."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from support.parts import PartMissing

_missing = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_missing] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo and call.excinfo.errisinstance(PartMissing):
        item.config.stash[_missing].add(str(call.excinfo.value))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for sentence in sorted(config.stash[_missing]):
        terminalreporter.write_line(f"not everything could be tested: {sentence}", red=True)
