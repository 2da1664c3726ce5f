"""Headless Chromium for tests: Debian's or another on PATH, driven by playwright; its absence is a failure with the line that mends it."""

from __future__ import annotations

import shutil
from typing import Any

from support.parts import PartMissing

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",  # containers and CI run as root, where Chromium's own sandbox does not start
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class ChromiumMissing(PartMissing):
    """no chromium on PATH, so the page cannot be tested; install it: apt-get install chromium"""


def launch_options() -> dict[str, Any]:
    """Arguments of playwright's chromium.launch. Raises ChromiumMissing."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return {"executable_path": path, "headless": True, "args": FLAGS}
    raise ChromiumMissing(ChromiumMissing.__doc__)
