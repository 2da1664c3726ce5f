"""C++ that is compiled at its first use, for the very processor it runs on, and kept in the user's cache.

Decides where the result is kept and when it is made anew: whenever source, compiler or processor is another. No compiler is needed to
run: who asks gets None and computes in plain torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from mixtral_worker.telemetry import LOG, line

COMPILERS = ("c++", "g++", "clang++")
COMPILE_WITHIN_S = 120
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno", "-w")


def library(source: Path) -> ctypes.CDLL | None:
    """The functions of this source; None, with the reason in the log, where it cannot be compiled or loaded here."""
    compiler = _compiler()
    if compiler is None:
        LOG.info(line("kernel", path="torch", reason="no C++ compiler found; g++ on PATH or CXX would make decoding faster"))
        return None
    try:
        path = _compiled(source, compiler)
        # OpenMP's functions are left open and found in the runtime that torch has loaded: two of them would fight over the cores.
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        told = error.stderr.strip()[-500:] if isinstance(error, subprocess.CalledProcessError) else str(error)
        LOG.warning(line("kernel", path="torch", reason=f"{source.name} could not be compiled or loaded: {told}"))
        return None


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)


def _compiled(source: Path, compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=COMPILE_WITHIN_S).stdout
    key = sha256("\0".join([source.read_text(encoding="utf-8"), version, _processor(), *FLAGS]).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixtral_worker"
    path = folder / f"{source.stem}-{key}.so"
    if path.is_file():
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as here:  # ranks may build at once: each for itself, the last one's stays
        made, linked = f"{here}/{source.stem}.o", f"{here}/{source.stem}.so"
        for command in (["-fopenmp", *FLAGS, "-c", str(source), "-o", made], ["-shared", made, "-o", linked]):
            subprocess.run([compiler, *command], capture_output=True, text=True, check=True, timeout=COMPILE_WITHIN_S)
        os.replace(linked, path)
    LOG.info(line("kernel_compiled", source=source.name, compiler=compiler, after_s=time.monotonic() - began_s))
    return path


def _processor() -> str:
    """What the processor is able to do: a home folder may be shared by machines of several kinds."""
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.machine() + platform.processor()
    return next((row for row in rows if row.startswith(("flags", "Features"))), platform.machine())
