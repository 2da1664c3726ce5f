"""Redis as others run it, of real redis-server processes: over TLS with users, behind three Sentinels, as a Cluster of three nodes.

Each has a `url` before it is entered, is started by `with`, and takes start() and flush() as RedisProcess does.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import redis

from mixtral_server.redis_server import tethered
from support.http import PATIENCE_S
from support.parts import PartMissing
from support.ports import free_port
from support.redis import RedisProcess, redis_binary

PASSWORD, SENTINEL_PASSWORD = "p@ss/word#1", "s3ntinel:secret"
MASTER = "mymaster"
SLOTS = (range(4001), range(4001, 10001), range(10001, 16384))
"""Of the three nodes. The endpoint brisk lives in slot 3340, steady in 5194, the limiter in 2716."""


def wait_for(is_so: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            if is_so():
                return
        except redis.RedisError as error:
            what = f"{what} ({error})"
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not come to pass that {what}")
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------- TLS


class Certificates:
    """An authority of our own, a certificate of 127.0.0.1, one of a client, and an authority that nobody trusts."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            raise PartMissing("certificates for the tests of TLS are made by openssl; install it with 'apt-get install openssl'")
        self.folder = folder
        for authority in ("ca", "other"):
            self._run("req", "-x509", *self._new_key(authority), "-out", self.path(f"{authority}.crt"), "-subj", f"/CN={authority}")
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        for name in ("server", "client"):
            self._run("req", *self._new_key(name), "-out", self.path(f"{name}.csr"), "-subj", f"/CN={name}")
            signed = ("-CA", self.path("ca.crt"), "-CAkey", self.path("ca.key"), "-CAcreateserial", "-extfile", self.path("names"))
            self._run("x509", "-req", "-in", self.path(f"{name}.csr"), *signed, "-out", self.path(f"{name}.crt"), "-days", "2")

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def _new_key(self, name: str) -> tuple[str, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", self.path(f"{name}.key"))

    def _run(self, *words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)

    @property
    def options(self) -> str:
        """For a rediss:// URL."""
        names = {"ssl_ca_certs": "ca.crt", "ssl_certfile": "client.crt", "ssl_keyfile": "client.key"}
        return "&".join(f"{option}={self.path(name)}" for option, name in names.items())


class TlsRedis(RedisProcess):
    """Takes TLS with a client's certificate on its port, and plain connections on its unix socket alone; with one user of ours."""

    def __init__(self, user: str, rules: str, version: str = "7.0") -> None:
        self.port = free_port()
        self._certificates_folder = Path(tempfile.mkdtemp(prefix="mixtral-tls-"))
        self.certificates = ours = Certificates(self._certificates_folder)
        tls = ("--tls-port", str(self.port), "--tls-cert-file", ours.path("server.crt"), "--tls-key-file", ours.path("server.key"))
        tls += ("--tls-ca-cert-file", ours.path("ca.crt"), "--appendonly", "yes")
        tls += ("--user", user, "on", f">{PASSWORD}", *rules.split())
        super().__init__(redis_binary(version), *tls)
        self.tls_url = f"rediss://{user}:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/0?{self.certificates.options}"

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        shutil.rmtree(self._certificates_folder)


# ---------------------------------------------------------------------------------------------- Sentinels


class SentinelRedis:
    """A master, a replica and three Sentinels, all with passwords. `master` and `replica` are who is it now."""

    def __init__(self, version: str = "6.2") -> None:
        self._binary = redis_binary(version)
        self._ports = [free_port() for _ in range(2)]
        self._sentinel_ports = [free_port() for _ in range(3)]
        self.nodes = [self._node(port) for port in self._ports]
        self._folder = Path(tempfile.mkdtemp(prefix="mixtral-sentinel-"))
        self._sentinels: list[subprocess.Popen[bytes]] = []
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._sentinel_ports)
        self.url = f"redis+sentinel://:{quote(PASSWORD, safe='')}@{hosts}/{MASTER}/0?sentinel_password={quote(SENTINEL_PASSWORD)}"

    def _node(self, port: int) -> RedisProcess:
        secrets = ("--requirepass", PASSWORD, "--masterauth", PASSWORD)
        log = ("--appendonly", "yes", "--repl-diskless-sync-delay", "0")
        return RedisProcess(self._binary, "--port", str(port), "--bind", "127.0.0.1", *secrets, *log, password=PASSWORD)

    def __enter__(self) -> SentinelRedis:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            with self.nodes[1].client() as replica:
                replica.replicaof("127.0.0.1", self._ports[0])
            stack.callback(self._end_sentinels)
            for number, port in enumerate(self._sentinel_ports):
                self._sentinels.append(self._sentinel(number, port))
            wait_for(self._is_whole, "three Sentinels know one another, the master and its replica")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        shutil.rmtree(self._folder)

    def _sentinel(self, number: int, port: int) -> subprocess.Popen[bytes]:
        config = self._folder / f"sentinel-{number}.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {self._folder}\n"
            f"requirepass {SENTINEL_PASSWORD}\nsentinel sentinel-pass {SENTINEL_PASSWORD}\n"
            f'sentinel monitor {MASTER} 127.0.0.1 {self._ports[0]} 2\nsentinel auth-pass {MASTER} "{PASSWORD}"\n'
            f"sentinel down-after-milliseconds {MASTER} 800\nsentinel failover-timeout {MASTER} 3000\n"
        )
        command = tethered([str(self._binary), str(config), "--sentinel"])
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def _end_sentinels(self) -> None:
        for sentinel in self._sentinels:
            sentinel.kill()
            sentinel.wait(PATIENCE_S)

    def _facts(self, port: int) -> dict[str, str]:
        with redis.Redis(port=port, password=SENTINEL_PASSWORD, decode_responses=True) as sentinel:
            facts: dict[str, str] = sentinel.execute_command("SENTINEL", "MASTER", MASTER)
            return facts

    def _is_whole(self) -> bool:
        """Every Sentinel knows the others and one master, which has its replica in step."""
        facts = [self._facts(port) for port in self._sentinel_ports]
        known = {(one["port"], str(one["num-other-sentinels"]), str(one["num-slaves"])) for one in facts}
        if (
            len(known) != 1
            or next(iter(known))[1:] != ("2", "1")
            or any(str(one["flags"]) not in ("master", "{'master'}") for one in facts)
        ):
            return False
        with self.replica.client() as replica:
            said = replica.info("replication")
        return said["role"] == "slave" and said["master_link_status"] == "up" and str(said["master_port"]) == str(facts[0]["port"])

    @property
    def master(self) -> RedisProcess:
        with redis.Redis(port=self._sentinel_ports[0], password=SENTINEL_PASSWORD, decode_responses=True) as sentinel:
            port = int(sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[1])
        return self.nodes[self._ports.index(port)]

    @property
    def replica(self) -> RedisProcess:
        master = self.master
        return next(node for node in self.nodes if node is not master)

    @property
    def is_running(self) -> bool:
        return all(node.is_running for node in self.nodes)

    def start(self) -> None:
        """Who comes back follows the master of now, as the Sentinels would tell it ten seconds later."""
        for node in self.nodes:
            if not node.is_running:
                node.start()
        with self.replica.client() as replica:
            replica.config_set("masterauth", PASSWORD)
            replica.replicaof("127.0.0.1", self._ports[self.nodes.index(self.master)])

    def flush(self) -> None:
        wait_for(self._is_whole, "the master has its replica again", 3 * PATIENCE_S)
        with self.master.client() as client:
            client.flushall()

    def cut_off_replica(self) -> None:
        """The replica hears its master no more, and stands where it is."""
        with self.replica.client() as replica:
            replica.config_set("masterauth", "wrong")
            replica.execute_command("CLIENT", "KILL", "TYPE", "master")


# ---------------------------------------------------------------------------------------------- Cluster


class ClusterRedis:
    """Three masters with the slots of SLOTS, and a replica of the second."""

    def __init__(self, version: str = "7.0") -> None:
        self._binary = redis_binary(version)
        self.ports = [free_port(below=50_000) for _ in range(4)]
        self.nodes = [self._node(port) for port in self.ports]
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in self.ports[:2])

    def _node(self, port: int) -> RedisProcess:
        cluster = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1200", "--cluster-replica-validity-factor", "0")
        log = ("--appendonly", "yes", "--repl-diskless-sync-delay", "0")
        return RedisProcess(self._binary, "--port", str(port), "--bind", "127.0.0.1", *cluster, *log)

    def __enter__(self) -> ClusterRedis:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            clients = [stack.enter_context(node.client()) for node in self.nodes]
            for client, slots in zip(clients, SLOTS, strict=False):
                client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            for number, client in enumerate(clients):
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for port in self.ports[1:]:
                clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port)
            self.ids = [str(client.execute_command("CLUSTER MYID")) for client in clients]
            wait_for(lambda: all(len(client.execute_command("CLUSTER NODES")) == 4 for client in clients), "all nodes have met")
            clients[3].execute_command("CLUSTER", "REPLICATE", self.ids[1])
            wait_for(self.is_whole, "the Cluster has all slots and the replica is in step")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def is_whole(self) -> bool:
        """Every node sees every slot served, and the pair of the second range is in step."""
        for node in self.nodes:
            with node.client() as client:
                said = client.execute_command("CLUSTER INFO")
                if said["cluster_state"] != "ok" or said["cluster_slots_ok"] != "16384" or said["cluster_known_nodes"] != "4":
                    return False
        roles = []
        for node in (self.nodes[1], self.nodes[3]):
            with node.client() as client:
                said = client.info("replication")
                roles.append((said["role"], said.get("master_link_status", "up")))
        return sorted(roles) == [("master", "up"), ("slave", "up")]

    def owner(self, slot: int) -> RedisProcess:
        """By the view of the first node."""
        with self.nodes[0].client() as client:
            rows = client.execute_command("CLUSTER NODES")
        for address, row in rows.items():
            if "master" in row["flags"] and any(int(one[0]) <= slot <= int(one[-1]) for one in row["slots"]):
                return self.nodes[self.ports.index(int(address.rpartition(":")[2].partition("@")[0]))]
        raise AssertionError(f"slot {slot} has no owner")

    @property
    def is_running(self) -> bool:
        return all(node.is_running for node in self.nodes)

    def start(self) -> None:
        for node in self.nodes:
            if not node.is_running:
                node.start()

    def flush(self) -> None:
        wait_for(self.is_whole, "the Cluster is whole again", 3 * PATIENCE_S)
        for node in self.nodes:
            with node.client() as client:
                if client.info("replication")["role"] == "master":
                    client.flushall()
