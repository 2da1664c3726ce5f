"""The processes of one torchrun and how they keep step.

Rank 0 leads: it alone talks to the server and makes plans. Each step it sends the plan to the others as one int32 tensor over a gloo
group, on GPUs too, so that the plan never waits for the device. The model's own collectives run in fairscale's model-parallel group.
What a plan says is plan.py's; when to send one, heartbeats included, is the loop's.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from mixtral_worker.plan import PlanCodec, StepPlan

SMALL_MODEL_BYTES = 64 * 2**20
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
    ranks_on_host: int = 1

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def add(self, name: str, number: int) -> int:
        """Add to the sum of this name, which all ranks share; returns what it is now."""
        return int(self.store.add(name, number))

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
    store = next(rendezvous("env://", timeout=timeout))[0]
    backend = "nccl" if here.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=PrefixStore("groups", store), rank=rank, world_size=world, timeout=timeout)
    fairscale_groups.initialize_model_parallel(world)
    size = fairscale_groups.get_model_parallel_world_size()
    if size != world:  # fairscale clamps sizes without a word
        raise RuntimeError(f"the model-parallel group has {size} ranks; torchrun started {world}; they must be equal")
    yield Ranks(rank, world, here, dist.new_group(backend="gloo", timeout=timeout), store, ranks_on_host)
    fairscale_groups.destroy_model_parallel()
    dist.destroy_process_group()


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
