"""The load: a worker without a model, readers of streams, callers of jobs. Each runs in a process of its own, on raw sockets.

Decides nothing but to cost little: what is measured is the server, and these share the machine with it. Every function here reports
its own CPU seconds, so that a run shows who was busy.
"""

from __future__ import annotations

import json
import re
import resource
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from mixtral_client.protocol import PROTOCOL_VERSION
from mixtral_server.bench.house import ENDPOINT, BenchFailed

HOST = "127.0.0.1"
SILENCE_LIMIT_S = 60.0
_OFFSET = re.compile(rb"\nid: (\d+)\.")
_STAMP = re.compile(rb'"(?:content|text)":"(\d+)"')
_UNSTAMPED = "@" * 16
"""The text of every token until its turn is sent: then the moment of that, monotonic ns in as many digits."""


@dataclass(frozen=True)
class Target:
    """Where the load goes, and with which key."""

    port: int
    key: str

    def connect(self) -> socket.socket:
        connection = socket.create_connection((HOST, self.port), timeout=SILENCE_LIMIT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {self.key}\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + (b"Content-Type: application/json\r\n" if body else b"") + b"\r\n" + body


def own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def call(connection: socket.socket, request: bytes) -> Any:
    """Send a request and read its whole answer as JSON. Raises BenchFailed for a status that is none of 2xx."""
    connection.sendall(request)
    received = b""
    while (size := answer_size(received)) is None or len(received) < size:
        part = connection.recv(1 << 20)
        if not part:
            raise BenchFailed("the server closed the connection before its answer was whole")
        received += part
    body = received[received.index(b"\r\n\r\n") + 4 :]
    if received[9:10] != b"2":
        raise BenchFailed(f"the server answered {received[9:12].decode()}: {body[:300].decode()}")
    return json.loads(body)


def answer_size(received: bytes) -> int | None:
    """Bytes of head and body together; None while the head is not whole."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    at = received.lower().index(b"content-length:", 0, end) + 15
    return end + 4 + int(received[at : received.index(b"\r", at)])


# ---------------------------------------------------------------------------------------------- a worker


@dataclass(frozen=True)
class WorkerPlan:
    """slots: jobs at once, and jobs to wait for before the first token; tokens_per_frame: of each job in each turn; turns_per_s: 0 is
    one after another; job_tokens: of each job; jobs: after how many the worker is done."""

    slots: int
    jobs: int
    job_tokens: int
    tokens_per_frame: int
    turns_per_s: float = 0.0
    waits_for_all: bool = True


@dataclass
class WorkerResult:
    turns: int
    cpu_s: float
    seconds: float


def work(target: Target, plan: WorkerPlan) -> WorkerResult:
    """Answer every job with tokens whose text is the moment at which their turn was sent."""
    connection = target.connect()
    login = {
        "endpoint": ENDPOINT, "name": "bench", "protocol": PROTOCOL_VERSION, "version": "1", "model": "none", "device": "none",
        "max_slots": plan.slots, "max_seq_len": 1 << 20,
    }  # fmt: skip
    session = call(connection, target.request("POST", "/v1/worker/sessions", json.dumps(login).encode()))["session"]
    produced: dict[str, int] = {}
    attempts: dict[str, int] = {}
    turn = done = 0
    started: float | None = None
    ids = ",".join(["12345"] * plan.tokens_per_frame)
    while done < plan.jobs:
        turn += 1
        frames = []
        if produced and (started is not None or not plan.waits_for_all or len(produced) == min(plan.slots, plan.jobs)):
            started = started or time.monotonic()
            if plan.turns_per_s:
                time.sleep(max(0.0, started + turn / plan.turns_per_s - time.monotonic()))
            texts = ",".join([f'"{_UNSTAMPED}"'] * plan.tokens_per_frame)
            for job, n in list(produced.items()):
                ending = ""
                if n + plan.tokens_per_frame >= plan.job_tokens:
                    ending = ',"finish":"stop","prompt_tokens":10'
                    del produced[job]
                    done += 1
                else:
                    produced[job] = n + plan.tokens_per_frame
                frames.append(
                    f'{{"job":"{job}","attempt":{attempts[job]},"offset":{n + 1},"ids":[{ids}],"texts":[{texts}],"release":false{ending}}}'
                )
        holding = ",".join(f'["{job}",{attempts[job]}]' for job in produced)
        room = plan.slots - len(produced)
        body = f'{{"session":"{session}","turn":{turn},"holding":[{holding}],"frames":[{",".join(frames)}],"room":{room},"telemetry":{{}}}}'
        turn_request = target.request("POST", "/v1/worker/turn", body.encode())
        answer = call(connection, turn_request.replace(_UNSTAMPED.encode(), b"%016d" % time.monotonic_ns()))
        if answer["drops"] or answer["expect"]:
            raise BenchFailed(f"the server refused frames: drops {answer['drops'][:2]}, expect {answer['expect'][:2]}")
        for job in answer["jobs"]:
            produced[job["id"]], attempts[job["id"]] = 0, job["attempt"]
    return WorkerResult(turn, own_cpu_s(), time.monotonic() - (started or time.monotonic()))


# ---------------------------------------------------------------------------------------------- readers of streams


@dataclass(frozen=True)
class ReaderPlan:
    """streams: connections, one job each; wire: openai or native; job_tokens: of each, checked; is_timed: look at every token's stamp."""

    streams: int
    job_tokens: int
    wire: str = "openai"
    is_timed: bool = False
    nap_s: float = 0.0


@dataclass
class ReaderResult:
    tokens: int
    bytes: int
    reads: int
    cpu_s: float
    seconds: float  # from the first token to the last
    latencies_ms: list[float] = field(default_factory=list)


class _Stream:
    """One connection: counts the events that it brings and keeps the last offset named."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.events = 0
        self.offset = 0
        self._tail = b""

    def take(self, part: bytes) -> None:
        joined = self._tail + part
        self.events += joined.count(b"\nid: ") - self._tail.count(b"\nid: ")
        offsets = _OFFSET.findall(joined)
        if offsets:
            self.offset = int(offsets[-1])
        self._tail = joined[-64:]

    @property
    def is_over(self) -> bool:
        return self._tail.endswith(b"\r\n0\r\n\r\n")


def read_streams(target: Target, plan: ReaderPlan) -> ReaderResult:
    """Open every stream, read each to its end. Raises BenchFailed when one has not every token once."""
    waiting = selectors.DefaultSelector()
    for connection in [open_stream(target, plan) for _ in range(plan.streams)]:
        connection.setblocking(False)
        waiting.register(connection, selectors.EVENT_READ, _Stream(connection))
    result = ReaderResult(0, 0, 0, 0.0, 0.0)
    began = time.monotonic()
    left = plan.streams
    while left:
        ready = waiting.select(SILENCE_LIMIT_S)
        if not ready:
            raise BenchFailed(f"{left} streams brought nothing for {SILENCE_LIMIT_S:g} s")
        if plan.nap_s:
            time.sleep(plan.nap_s)
        received = [(key.data, key.data.connection.recv(1 << 18), time.monotonic_ns()) for key, _ in ready]  # looked at when all are read
        for stream, part, now in received:
            if result.tokens == result.reads == 0:
                began = time.monotonic()
            result.reads += 1
            result.bytes += len(part)
            stream.take(part)
            if plan.is_timed:
                result.latencies_ms += [(now - int(stamp)) / 1e6 for stamp in _STAMP.findall(part)]
            if stream.is_over or not part:
                waiting.unregister(stream.connection)
                left -= 1
                if stream.events != plan.job_tokens or stream.offset != plan.job_tokens:
                    raise BenchFailed(f"a stream brought {stream.events} tokens up to offset {stream.offset}; {plan.job_tokens} were sent")
                result.tokens += stream.events
    result.seconds = time.monotonic() - began
    result.cpu_s = own_cpu_s()
    return result


def open_stream(target: Target, plan: ReaderPlan) -> socket.socket:
    connection = target.connect()
    chat = {"model": ENDPOINT, "messages": [{"role": "user", "content": "hello"}], "max_tokens": plan.job_tokens}
    if plan.wire == "native":
        job = call(connection, target.request("POST", "/v1/jobs", json.dumps(chat).encode()))["id"]
        connection.sendall(target.request("GET", f"/v1/jobs/{job}/events"))
    else:
        connection.sendall(target.request("POST", "/v1/chat/completions", json.dumps(chat | {"stream": True}).encode()))
    return connection


# ---------------------------------------------------------------------------------------------- callers of whole answers


@dataclass(frozen=True)
class CallerPlan:
    """callers: connections with one call open each; calls: in all."""

    callers: int
    calls: int
    nap_s: float = 0.0


@dataclass
class CallerResult:
    calls: int
    seconds: float
    cpu_s: float
    latencies_ms: list[float]


def call_whole(target: Target, plan: CallerPlan) -> CallerResult:
    """Chats without a stream, each connection one after another. Raises BenchFailed for an answer that is not 200 and whole."""
    chat = {"model": ENDPOINT, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}
    request = target.request("POST", "/v1/chat/completions", json.dumps(chat).encode())
    waiting = selectors.DefaultSelector()
    began = time.monotonic()
    latencies: list[float] = []
    sent = 0

    def ask(connection: socket.socket) -> tuple[float, bytearray]:
        connection.sendall(request)
        return time.monotonic(), bytearray()

    for _ in range(min(plan.callers, plan.calls)):
        connection = target.connect()
        waiting.register(connection, selectors.EVENT_READ, ask(connection))
        sent += 1
    while len(latencies) < plan.calls:
        ready = waiting.select(SILENCE_LIMIT_S)
        if not ready:
            raise BenchFailed(f"{sent - len(latencies)} calls had no answer for {SILENCE_LIMIT_S:g} s")
        time.sleep(plan.nap_s)
        for key, _ in ready:
            asked_at, received = key.data
            connection = key.fileobj  # type: ignore[assignment]
            received += connection.recv(1 << 16)
            if (size := answer_size(bytes(received))) is None or len(received) < size:
                continue
            if received[9:12] != b"200" or b'"finish_reason":"stop"' not in received:
                raise BenchFailed(f"a call was answered: {received[:600].decode()}")
            latencies.append((time.monotonic() - asked_at) * 1000)
            if sent < plan.calls:
                waiting.modify(connection, selectors.EVENT_READ, ask(connection))
                sent += 1
            else:
                waiting.unregister(connection)
    return CallerResult(len(latencies), time.monotonic() - began, own_cpu_s(), latencies)


# ---------------------------------------------------------------------------------------------- readers that only wait


def hold_streams(target: Target, count: int) -> list[socket.socket]:
    """Put so many jobs and open a native stream of each, until its first event; they stay open as long as the list is kept."""
    chat = {"model": ENDPOINT, "messages": [{"role": "user", "content": "hello"}]}
    request = target.request("POST", "/v1/jobs", json.dumps(chat).encode())
    caller = target.connect()
    held = []
    for _ in range(count):
        job = call(caller, request)["id"]
        connection = target.connect()
        connection.sendall(target.request("GET", f"/v1/jobs/{job}/events"))
        received = b""
        while b"queued" not in received:
            part = connection.recv(1 << 16)
            if not part:
                raise BenchFailed(f"the server closed an idle stream: {received[:300].decode()}")
            received += part
        held.append(connection)
    caller.close()
    return held
