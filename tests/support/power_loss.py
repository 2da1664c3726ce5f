"""What a power loss leaves of a Redis's files, simulated in its worst form.

A library before libc notes how long each file was when a sync of it began, and which renames no sync of their folder has followed
(power_loss.c, made here with cc). After kill -9, `cut` shortens every file to what was synced (to nothing where that never happened) and
takes back those renames. It covers the kernel's cache. It does not cover disks that say they wrote and did not, nor parts of writes that
reached the disk without a sync: those only ever leave more than this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from support.parts import PartMissing

SOURCE = Path(__file__).with_name("power_loss.c")


class PowerLoss:
    """folder: for the library and its notes, outside of the files it is about."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise PartMissing("power loss is simulated by a small C library; install a compiler with 'apt-get install gcc libc6-dev'")
        self._library = folder / "power_loss.so"
        self._notes = folder / "notes"
        self._delay = folder / "delay"
        self._notes.touch()
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._library), str(SOURCE), "-ldl"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise PartMissing(f"power_loss.c is not compiled ({made.stderr.strip()}); install 'gcc libc6-dev'")

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "MIXTRAL_SYNC_LOG": str(self._notes), "MIXTRAL_SYNC_DELAY": str(self._delay)}

    @property
    def syncs(self) -> int:
        """Files synced so far."""
        return sum(line.startswith("S ") for line in self._notes.read_text().splitlines())

    def slow(self, ms: int) -> None:
        """Every sync from now on takes so much longer."""
        fresh = self._delay.with_suffix(".new")
        fresh.write_text(str(ms))
        fresh.replace(self._delay)

    def cut(self, folder: Path, *, forgets_renames: bool = True) -> int:
        """Call it when whoever wrote is dead. forgets_renames: as no journaling file system does once the renamed file was synced again.
        Returns how many bytes were lost."""
        synced: dict[int, int] = {}
        renames: list[tuple[int, list[str]]] = []
        for line in self._notes.read_text().splitlines():
            word, _, rest = line.partition(" ")
            if word == "S":
                inode, size = map(int, rest.split())
                synced[inode] = size
            elif word == "D":
                renames = [one for one in renames if one[0] != int(rest)]
            elif word == "R":
                inode, names = rest.split(" ", 1)
                renames.append((int(inode), names.split("\t")))
        for _, (old, new, kept) in reversed(renames if forgets_renames else []):
            if not os.path.exists(new):
                continue  # it went on under another name, which was synced
            os.rename(new, old)
            if kept != "-":
                os.rename(kept, new)
        self._notes.write_text("")
        lost = 0
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name != "owner.lock":
                facts = path.stat()
                keep = min(facts.st_size, synced.get(facts.st_ino, 0))
                lost += facts.st_size - keep
                os.truncate(path, keep)
        return lost
