"""The processes of one torchrun and how they keep step.

Rank 0 leads: it alone talks to the server and makes plans. Each step it sends the plan to the others as one int32 tensor over a gloo
group, on GPUs too, so that the plan never waits for the device. The model's own collectives run in fairscale's model-parallel group.
What a plan says is plan.py's; when to send one, heartbeats included, is the loop's.
"""

import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from mixtral_worker.plan import PlanCodec, StepPlan

SMALL_MODEL_BYTES = 64 * 2**20
BLAME_WITHIN_S = 1.0  # after a rank died, the others end at the latest so much later
MEET_EVERY_S = 0.02
COLLECTIVE_TIMEOUT_S = 120  # a rank that waits longer than this for the others gives up; heartbeats come far more often

MEET_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its worker."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None  # None with one rank
    # What the ranks tell one another without waiting:
    store: Store = field(default_factory=dist.HashStore)  # type: ignore[attr-defined]
    pids_on_host: dict[int, int] = field(default_factory=dict)  # rank → process, this one included

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def ranks_on_host(self) -> int:
        return max(1, len(self.pids_on_host))

    def add(self, name: str, number: int) -> int:
        """Add to the sum of this name, which all ranks share; returns what it is now."""
        return int(self.store.add(name, number))

    def others_gone(self) -> str:
        """Call when something broke: the ranks that ended before this one, as "1" or "1, 2"; "" if none did, so far as can be known.

        A rank sees only those of its own host; the first to see one tells all. So ranks of another host wait for that for a while.
        """
        gives_up_s = time.monotonic() + BLAME_WITHIN_S
        while True:
            try:
                gone = ", ".join(str(rank) for rank, pid in self.pids_on_host.items() if not _is_running(pid))
                told = self.store.compare_set("gone", "", gone).decode() if gone else _value(self.store, "gone")
            except RuntimeError:  # the store went with the host of rank 0
                told = gone
            if told or time.monotonic() > gives_up_s:
                return told
            time.sleep(BLAME_WITHIN_S / 20)

    def share(self, plan: StepPlan | None, codec: PlanCodec) -> StepPlan:
        """Rank 0 gives a plan, the others give None and wait for it; all return it. Every rank needs an equal codec."""
        if self.is_leader != (plan is not None):
            raise ValueError(f"rank 0 gives the plan and the others None; rank {self.rank} gave {plan}")
        if self.control is None:
            assert plan is not None
            return plan
        buffer = torch.from_numpy(codec.pack(plan)) if plan else torch.empty(codec.size, dtype=torch.int32)
        dist.broadcast(buffer, src=0, group=self.control)
        return plan or codec.unpack(buffer.numpy())

    def meet(self) -> None:
        """Return once every rank has left its step and come here. Raises RuntimeError when one does not: it waits in a collective."""
        if self.control is not None:
            arrived = dist.barrier(self.control, async_op=True)
            assert arrived is not None
            arrived.wait(timedelta(seconds=MEET_TIMEOUT_S))


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """Meet the other ranks that torchrun started; without torchrun this process is the only one.

    device is auto, cpu or cuda; auto takes a GPU where there is one. Groups end with the block. When the block fails nothing is said
    to the other ranks: this process ends with the error, its connections break, and that ends the others and the whole torchrun.
    """
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    here, ranks_on_host = _device(device, local_rank), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    set_threads(ranks_on_host)
    if world == 1:
        yield Ranks(0, 1, here, None)
        return
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store = _meet(next(rendezvous("env://", timeout=timeout))[0], rank, world)
    backend = "nccl" if here.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=PrefixStore("groups", store), rank=rank, world_size=world, timeout=timeout)
    fairscale_groups.initialize_model_parallel(world)
    size = fairscale_groups.get_model_parallel_world_size()
    if size != world:  # fairscale clamps sizes without a word
        raise RuntimeError(f"the model-parallel group has {size} ranks; torchrun started {world}; they must be equal")
    yield Ranks(rank, world, here, dist.new_group(backend="gloo", timeout=timeout), store, _pids_on_host(store, rank, world))
    fairscale_groups.destroy_model_parallel()
    dist.destroy_process_group()


def _meet(store: Store, rank: int, world: int) -> Store:
    """The part of torchrun's store that is this meeting's own.

    The store outlives a restart, and in it stands where ranks that are gone listened. Nothing that torchrun tells is new with each restart
    and the same on all hosts: TORCHELASTIC_RESTART_COUNT counts each host's own failures.
    """
    mine = uuid.uuid4().hex  # rank 0's names the meeting, the others' are asked under
    if rank:
        store.set(f"asked by {rank}", mine)
        meeting = store.get(mine).decode()  # waits for the answer
        store.set(f"{meeting} joined by {rank}", "")
        return PrefixStore(meeting, store)
    gives_up_s = time.monotonic() + COLLECTIVE_TIMEOUT_S
    while missing := [other for other in range(1, world) if not store.check([f"{mine} joined by {other}"])]:
        if time.monotonic() > gives_up_s:
            raise RuntimeError(f"ranks {missing} did not come within {COLLECTIVE_TIMEOUT_S} s; their own logs say why")
        for asking in filter(None, (_value(store, f"asked by {other}") for other in missing)):
            store.set(asking, mine)
        time.sleep(MEET_EVERY_S)
    return PrefixStore(mine, store)


def _pids_on_host(store: Store, rank: int, world: int) -> dict[int, int]:
    host = platform.node()
    store.set(f"process {rank}", f"{os.getpid()}@{host}")
    told = (store.get(f"process {other}").decode().partition("@") for other in range(world))
    return {other: int(pid) for other, (pid, _, its_host) in enumerate(told) if its_host == host}


def _is_running(pid: int) -> bool:
    """A process that has ended but that torchrun has not yet asked for is not running."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # not Linux
        return True
    return state not in "ZX"


def _value(store: Store, name: str) -> str:
    return store.get(name).decode() if store.check([name]) else ""


def set_threads(ranks_on_host: int) -> None:
    """Share this host's processors evenly among its ranks; torchrun would leave each rank a single thread."""
    # What this process may use, where the system can say so; in a container that is less than the machine has.
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, processors // ranks_on_host))


def keep_small_model_to_one_thread(weights_bytes: int) -> None:
    """On a CPU, steps of a model that fits the processor's cache are so short that threads wait for each other longer than they work."""
    if weights_bytes < SMALL_MODEL_BYTES:
        torch.set_num_threads(1)


def _device(kind: str, local_rank: int) -> torch.device:
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RuntimeError(
            f"rank {local_rank} of this host needs a GPU of its own; {torch.cuda.device_count()} found; run with fewer ranks or on the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
