"""The page's pure modules under Node: each promise in *.test.mjs is one test there; here the whole run must pass."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.node import find_node

HERE = Path(__file__).parent


def test_node_tests_of_the_page_pass() -> None:
    files = sorted(str(path) for path in HERE.glob("*.test.mjs"))
    assert files, f"no *.test.mjs in {HERE}"
    run = subprocess.run([str(find_node()), "--test", *files], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
