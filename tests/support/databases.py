"""Databases for tests: SQLite, and a real PostgreSQL: its programs on PATH or where Debian keeps them."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import psutil

from support.parts import PartMissing

KINDS = ("sqlite", "postgresql")
DEBIAN = Path("/usr/lib/postgresql")


def postgres_programs() -> Path:
    """The folder of initdb and pg_ctl. Raises PartMissing with the line that installs them."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(DEBIAN.glob("*/bin"), key=lambda folder: int(folder.parent.name), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    raise PartMissing("accounts and history are tested on PostgreSQL too; install it with 'apt-get install postgresql'")


class PostgresProcess:
    """One PostgreSQL as our child, on a unix socket in a folder of its own: `with PostgresProcess() as server:`."""

    def __enter__(self) -> PostgresProcess:
        self._programs = postgres_programs()
        in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a cluster is a thousand small files
        self._folder = Path(tempfile.mkdtemp(prefix="mixtral-pg-", dir=in_memory))
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
        self._run("initdb", "-U", "mixtral", "-A", "trust", "--no-sync")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-l", f"{self._folder}/log", "-o", f"-k {self._folder} -c listen_addresses='' -c fsync=off", "start")

    def stop(self) -> None:
        """As a crash leaves it; start() brings it back."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Connections stay open and are taken, and nothing is answered."""
        postmaster = psutil.Process(int((self._folder / "data" / "postmaster.pid").read_text().split()[0]))
        family = [postmaster, *postmaster.children()]
        for one in family:
            one.suspend()
        try:
            yield
        finally:
            for one in reversed(family):
                one.resume()

    async def emptied(self) -> str:
        """The URL of its database, without what earlier tests left there."""
        connection = await asyncpg.connect(host=str(self._folder), user="mixtral", database="postgres")
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        await connection.close()
        return f"postgresql+asyncpg://mixtral@/postgres?host={self._folder}"

    def _run(self, program: str, *arguments: str) -> None:
        user = "nobody" if os.getuid() == 0 else None
        command = [str(self._programs / program), *arguments]
        subprocess.run([*command, "-D", f"{self._folder}/data"], user=user, cwd="/", check=True, stdout=subprocess.DEVNULL)
