"""A real nginx before replicas, with the file that users copy (docs/nginx.conf): only its addresses are ours."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from mixtral_server.redis_server import tethered
from support.parts import PartMissing

SHIPPED = Path(__file__).resolve().parents[2] / "docs" / "nginx.conf"
START_S = 20.0
AROUND = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log warn;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/mixtral.conf;
}}
"""


class Nginx:
    """`with Nginx(folder, port, urls) as nginx:` – then nginx.url. Needs no rights; ends with the test run."""

    def __init__(self, folder: Path, port: int, urls: Sequence[str], connections: int = 4096) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._folder = folder
        folder.mkdir(parents=True)
        text, replicas = re.subn(
            r"( *server )127\.0\.0\.1:\d+( max_fails=0;\n)(?: *server .*\n)*",
            "".join(rf"\g<1>{urlsplit(url).netloc}\g<2>" for url in urls),
            SHIPPED.read_text(),
        )
        text, listens = re.subn(r"listen 127\.0\.0\.1:8080;", f"listen 127.0.0.1:{port} backlog=4096;", text)
        assert (replicas, listens) == (1, 1), f"{SHIPPED} names its replicas or its port in another way"
        (folder / "mixtral.conf").write_text(text)
        (folder / "nginx.conf").write_text(AROUND.format(folder=folder, connections=connections))

    def __enter__(self) -> Nginx:
        found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if found is None:
            raise PartMissing("replicas are tested behind a real nginx; install it with 'apt-get install nginx-light'")
        command = [found, "-p", str(self._folder), "-c", str(self._folder / "nginx.conf"), "-e", str(self._folder / "error.log")]
        self._process = subprocess.Popen(tethered(command), stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"nginx does not answer: {self.said()}")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(START_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def said(self) -> str:
        path = self._folder / "error.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/livez", timeout=5):
                return True
        except urllib.error.HTTPError as error:
            with error:
                return True
        except OSError:
            return False
