"""The commands as an operator types them: real processes, with the Redis that the server starts for itself."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mixtral_server.apikeys import SCOPES
from mixtral_server.cli import main
from mixtral_server.process import write_keys_env
from mixtral_server.settings import knobs
from support.limits import with_open_files

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")} | more


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """A command in this process, in a folder of its own, without the variables of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in environment().keys() ^ os.environ.keys():
        monkeypatch.delenv(name)

    def run(*words: str) -> Ended:
        code = 0
        try:
            main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    return run


@contextmanager
def server(
    *words: str, cwd: Path, module: tuple[str, ...] = (str(ROOT / "server"),), files: tuple[int, int] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, url) of a server that takes requests; killed with all its children if it is still there at the end.

    files: open files that it may have at first, and may ask for.
    """
    command = [sys.executable, *module, "--port", "0", *words]
    if files is not None:
        command = with_open_files(*files, command)
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if found := re.search(r"listens on (http://\S+)", line):
                process.printed = printed  # type: ignore[attr-defined]
                yield process, found[1]
                return
        raise AssertionError(f"the server ended with {process.wait()}: {process.communicate()[1]}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


@contextmanager
def connections(url: str, count: int) -> Iterator[list[socket.socket]]:
    """So many that say nothing."""
    place = urlsplit(url)
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((place.hostname or "", place.port or 0), timeout=10)) for _ in range(count)]


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def keys_in(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if not line.startswith("#"))


def test_help_teaches_every_setting_with_its_default_and_limits(run: Callable[..., Ended]) -> None:
    shown = run("--help")
    assert shown.returncode == 0
    words = " ".join(shown.stdout.split())
    for name, knob in knobs().items():
        assert f"--{name} " in words or f"--{name}]" in words
        assert knob.sentence in words, name
        assert knob.limits in words, name
    assert "mixtral-server keys create --user alice --scope client" in words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "99999"], "mixtral-server: --port must be 0 to 65,535; got 99999"),
        (["--log_level", "loud"], "mixtral-server: --log_level must be debug, info, warning or error; got 'loud'"),
        (
            ["--endpoint_dir", "/nowhere"],
            "mixtral-server: endpoint_dir /nowhere is not a folder; name one that holds at least one endpoint file (*.toml)",
        ),
    ],
)
def test_wrong_setting_ends_with_code_2_and_one_sentence(run: Callable[..., Ended], words: list[str], sentence: str) -> None:
    ended = run(*words)
    assert (ended.returncode, ended.stderr.strip()) == (2, sentence)


def test_unknown_or_abbreviated_flag_ends_with_code_2(run: Callable[..., Ended]) -> None:
    for words in (["--prot", "1"], ["--por", "1"]):
        assert run(*words).returncode == 2


def test_environment_and_env_file_are_read(run: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("MIXTRAL_PORT=70001\n")
    assert "MIXTRAL_PORT in .env must be 0 to 65,535; got 70001" in run().stderr
    monkeypatch.setenv("MIXTRAL_PORT", "70000")
    assert "MIXTRAL_PORT must be 0 to 65,535; got 70000" in run().stderr


def test_taken_port_ends_with_code_1_and_one_sentence(run: Callable[..., Ended], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = run("--port", str(taken.getsockname()[1]), "--data_dir", str(tmp_path))
    assert ended.returncode == 1
    assert re.fullmatch(
        r"mixtral-server: port \d+ on 127\.0\.0\.1 cannot be used: .*; end what holds it, or give another --port or --host",
        ended.stderr.strip(),
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--database_url", "sqlite+aiosqlite:////nowhere/at/all.sqlite3"], "the database cannot be used"),
        (["--database_url", "postgresql+asyncpg://x@127.0.0.1:1/x"], "the database cannot be used"),
        (["--redis_url", "redis://127.0.0.1:1/0"], "Redis"),
        (["--data_dir", "/proc/nothing"], "data_dir /proc/nothing cannot be made"),
    ],
)
def test_store_that_is_not_there_ends_with_code_1_and_one_sentence(
    run: Callable[..., Ended], tmp_path: Path, words: list[str], sentence: str
) -> None:
    ended = run("--port", "0", "--data_dir", str(tmp_path), *words)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("mixtral-server: ")
    assert sentence in last
    assert "Traceback" not in ended.stderr


def test_first_start_makes_keys_prints_them_once_and_writes_them_for_their_owner_alone(tmp_path: Path) -> None:
    """By `python server` from anywhere, then by `python -m server` from the repository's root."""
    data = tmp_path / "data"
    with server("--data_dir", str(data), cwd=tmp_path) as (process, url):
        keys = keys_in(data / "keys.env")
        assert set(keys) == {"MIXTRAL_CLIENT_KEY", "MIXTRAL_WORKER_KEY", "MIXTRAL_ADMIN_KEY"}
        printed = process.printed  # type: ignore[attr-defined]
        assert all(f"{name}={key}" in printed for name, key in keys.items())
        assert stat.S_IMODE((data / "keys.env").stat().st_mode) == 0o600
        assert status(f"{url}/v1/models", Authorization=f"Bearer {keys['MIXTRAL_CLIENT_KEY']}") == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    with server("--data_dir", str(data), cwd=ROOT, module=("-m", "server")) as (process, url):
        assert "mx-c-" not in process.printed  # type: ignore[attr-defined]
        assert keys_in(data / "keys.env") == keys
        assert status(f"{url}/v1/models", Authorization=f"Bearer {keys['MIXTRAL_CLIENT_KEY']}") == 200


def test_sigterm_ends_the_server_its_redis_and_its_port_with_code_0(tmp_path: Path) -> None:
    with server("--data_dir", str(tmp_path), "--ready_delay_s", "0.1", cwd=ROOT) as (process, url):
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        with pytest.raises(urllib.error.URLError):
            status(f"{url}/livez")
        assert children_of_group(process.pid) == []


def children_of_group(group: int) -> list[str]:
    """Commands of the processes that a server left behind in its session."""
    listed = subprocess.run(["ps", "-eo", "sid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(group)]


def test_page_on_a_public_host_is_refused_with_a_warning_unless_said_twice(tmp_path: Path) -> None:
    with server("--host", "0.0.0.0", "--data_dir", str(tmp_path), "--public_page", cwd=ROOT) as (process, url):
        with urllib.request.urlopen(f"{url.replace('0.0.0.0', '127.0.0.1')}/v1/page", timeout=10) as answer:
            assert b'"public":false' in answer.read()
        process.send_signal(signal.SIGINT)
        log = process.communicate(timeout=PATIENCE_S)[1]
    assert "event=public_page_refused host=0.0.0.0" in log
    assert "--public_page_on_public_host as well" in log


def test_log_is_one_line_of_words_for_each_request(tmp_path: Path) -> None:
    with server("--data_dir", str(tmp_path), cwd=ROOT) as (process, url):
        assert status(f"{url}/v1/jobs/a%0Alevel=ERROR%20faked") == 401
        assert status(f"{url}/livez") == 200
        process.send_signal(signal.SIGINT)
        log = process.communicate(timeout=PATIENCE_S)[1]
    lines = [line for line in log.splitlines() if "path=" in line]
    assert len(lines) == 1
    assert re.search(r"level=INFO job=\S.* method=GET path=\S.* status=401 ms=\d+ request=req-\w+ address=127\.0\.0\.1$", lines[0])
    assert "\nlevel=ERROR" not in log


def test_keys_are_made_listed_and_revoked(run: Callable[..., Ended], tmp_path: Path) -> None:
    data = ("--data_dir", str(tmp_path))
    made = run(
        "keys",
        "create",
        "--user",
        "alice",
        "--scope",
        "client",
        "--scope",
        "worker",
        "--name",
        "laptop",
        *data,
        "--requests_per_minute",
        "60",
    )
    key = made.stdout.strip()
    assert (made.returncode, key.startswith("mx-c-"), len(key)) == (0, True, 48)
    listed = run("keys", "list", *data).stdout
    assert re.search(
        rf"^k\w+ +{re.escape(key[:11])} +laptop +alice +client worker +[\d-]+ [\d:]+ +60 requests/min, weight 1 +all$", listed, re.M
    )
    assert key not in listed
    changed = run("keys", "set", "laptop", "--requests_per_minute", "default", "--tokens_per_minute", "0", "--weight", "2.5", *data)
    limits = "unlimited tokens/min, weight 2.5"
    assert (changed.returncode, changed.stdout.strip()) == (
        0,
        f"{key[:11]}… (laptop of alice): {limits}; every server holds to it within 5 s",
    )
    assert re.search(rf"laptop .* {limits} +all$", run("keys", "list", *data).stdout, re.M)
    revoked = run("keys", "revoke", key[:11], *data)
    assert (revoked.returncode, revoked.stdout.strip()) == (0, f"revoked {key[:11]}… (laptop of alice); every server refuses it within 5 s")
    assert "laptop" not in run("keys", "list", *data).stdout
    assert re.search(r"laptop .* revoked$", run("keys", "list", "--all", *data).stdout, re.M)
    again = run("keys", "revoke", key[:11], *data)
    assert (again.returncode, "found none" in again.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokens_per_minute", "-1"], "must be a whole number of 0 to 1,000,000,000, or `default`; got '-1'"),
        (["--requests_per_minute", "many"], "must be a whole number of 0 to 1,000,000,000, or `default`; got 'many'"),
        (["--max_running", "1e3"], "must be a whole number of 0 to 1,000,000,000, or `default`; got '1e3'"),
        (["--weight", "nan"], "must be a number of 0.001 to 1,000; got 'nan'"),
        (["--weight", "0"], "must be a number of 0.001 to 1,000; got '0'"),
        (["--priority", "10"], "invalid choice: 10"),
    ],
)
def test_wrong_limit_of_a_key_ends_with_code_2_and_changes_nothing(run: Callable[..., Ended], words: list[str], sentence: str) -> None:
    for act in (["set", "laptop"], ["create", "--scope", "client"]):
        ended = run("keys", *act, *words)
        assert (ended.returncode, sentence in ended.stderr) == (2, True), ended.stderr


def test_migrate_says_what_it_did(run: Callable[..., Ended], tmp_path: Path) -> None:
    assert run("migrate", "--data_dir", str(tmp_path)).stdout.strip() == "database at revision 0002, from empty"
    assert run("migrate", "--data_dir", str(tmp_path)).stdout.strip() == "database at revision 0002, as before"


def test_keys_env_replaces_an_older_one_and_is_never_open_to_others(tmp_path: Path) -> None:
    (tmp_path / "keys.env").write_text("MIXTRAL_CLIENT_KEY=old\n")
    os.chmod(tmp_path / "keys.env", 0o644)
    write_keys_env(tmp_path, {scope: f"mx-{scope}" for scope in SCOPES})
    assert keys_in(tmp_path / "keys.env")["MIXTRAL_CLIENT_KEY"] == "mx-client"
    assert stat.S_IMODE((tmp_path / "keys.env").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["keys.env"]


def test_two_servers_that_start_at_once_on_one_folder_make_one_set_of_keys(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "server"), "--port", "0", "--data_dir", str(tmp_path)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    running = [start(), start()]
    try:
        printed, urls = "", []
        for process in running:
            assert process.stdout is not None
            for line in process.stdout:
                printed += line
                if found := re.search(r"listens on (http://\S+)", line):
                    urls.append(found[1])
                    break
        keys = keys_in(tmp_path / "keys.env")
        assert printed.count("MIXTRAL_CLIENT_KEY=") == 1
        assert [status(f"{url}/v1/models", Authorization=f"Bearer {keys['MIXTRAL_CLIENT_KEY']}") for url in urls] == [200, 200]
    finally:
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.communicate(timeout=PATIENCE_S)
    assert [process.returncode for process in running] == [0, 0]


# ---------------------------------------------------------------------------------------------- open files


def test_server_asks_for_the_open_files_that_its_connections_need(tmp_path: Path) -> None:
    with server(cwd=tmp_path, files=(128, 4096)) as (process, url):
        with connections(url, 300):
            assert status(f"{url}/readyz") == 200
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (4096, 4096)


def test_connections_beyond_the_open_files_that_the_account_may_have_are_closed_and_the_start_says_so(tmp_path: Path) -> None:
    with server(cwd=tmp_path, files=(128, 256)) as (process, url):
        assert process.stderr is not None
        said = next(line for line in process.stderr if "event=few_open_files" in line)
        assert "max_connections=10000 taken=128: this process may have 256 open files, and each connection is one" in said
        assert "raise the hard limit (ulimit -Hn, or LimitNOFILE= of systemd) to 10256, or set max_connections to 128" in said
        with connections(url, 300) as held:
            assert [one.recv(1) for one in held[128:]] == [b""] * 172
            held[0].sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert held[0].recv(1000).startswith(b"HTTP/1.1 200 ")
