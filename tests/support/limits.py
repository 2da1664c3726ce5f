"""A command as it runs for an account that may open few files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_BEGIN = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {})); os.execv(sys.argv[1], sys.argv[1:])"


def with_open_files(soft: int, hard: int, command: Sequence[str]) -> list[str]:
    """soft: what it may have at first; hard: what it may ask for."""
    return [sys.executable, "-c", _BEGIN.format(soft, hard), *command]
