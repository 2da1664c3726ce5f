"""docker-compose.yml and the Dockerfiles name only commands, paths, flags and services that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILES = sorted(ROOT.glob("*/Dockerfile"))


def words_of(command: list[str]) -> list[str]:
    """The words of a compose command; of `sh -c script`, those after its `exec`."""
    if command[:2] == ["sh", "-c"]:
        return shlex.split(command[2].rpartition("exec ")[2])
    return command


def commands() -> list[tuple[str, list[str]]]:
    ours = ((name, words_of(service["command"])) for name, service in COMPOSE["services"].items() if "build" in service)
    built = ((str(path.relative_to(ROOT)), yaml.safe_load(re.findall(r"^CMD (.*)$", path.read_text(), re.M)[0])) for path in DOCKERFILES)
    return [*ours, *built]


def test_compose_has_redis_server_and_a_worker_for_each_profile() -> None:
    assert set(COMPOSE["services"]) == {"redis", "server", "worker-demo", "worker-gpu"}
    assert COMPOSE["services"]["worker-demo"]["profiles"] == ["demo"]
    assert COMPOSE["services"]["worker-gpu"]["profiles"] == ["gpu"]


def test_compose_redis_keeps_an_append_only_file_and_never_evicts() -> None:
    command = COMPOSE["services"]["redis"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_compose_publishes_the_server_to_this_machine_only() -> None:
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["services"]["server"]["ports"])


def test_every_service_waited_for_and_every_volume_used_is_declared() -> None:
    for service in COMPOSE["services"].values():
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
        for volume in service.get("volumes", []):
            source = re.sub(r"^\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), volume


def test_every_build_names_a_dockerfile_that_exists() -> None:
    named = {service["build"]["dockerfile"] for service in COMPOSE["services"].values() if "build" in service}
    assert named == {str(path.relative_to(ROOT)) for path in DOCKERFILES}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=str)
def test_every_path_a_dockerfile_copies_exists_and_no_root_runs(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    assert re.search(r"^USER (?!root)\w+$", text, re.M), "the container must not run as root"


@pytest.mark.parametrize(("where", "words"), commands(), ids=[where for where, _ in commands()])
def test_every_command_in_a_container_knows_all_its_flags(where: str, words: list[str]) -> None:
    """The program named runs here with --help, and its help names every flag that the command gives it."""
    if words[:2] == ["python", "-m"]:
        component, flags = words[2], words[3:]
    else:
        assert words[0] == "torchrun", where
        after = words.index("worker")
        launcher = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True, timeout=100)
        assert all(flag.replace("_", "-") in launcher.stdout.replace("_", "-") for flag in words[1:after] if flag.startswith("--"))
        component, flags = words[after], words[after + 1 :]
    assert (ROOT / component / "__main__.py").exists()
    shown = subprocess.run([sys.executable, "-m", component, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0, shown.stderr
    for flag in flags:
        assert not flag.startswith("--") or flag in shown.stdout, f"{component} has no flag {flag}"
