"""What a machine can hold and at best reach: weights, room for chats, tokens per second. Pure arithmetic, no torch, no I/O.

Decides whether a model fits, how many chats it may compute together and how many tokens of KV cache to reserve, and what memory bandwidth
and FLOP/s allow at most. Nothing here is measured. Leaves to the caller where the numbers of a GPU or of this host come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mixtral_worker.blocks import BLOCK_SIZE
from mixtral_worker.model.config import SHAPES, ModelConfig, ModelError

GIB = 2**30
INT4_GROUP = 128  # weights that share one 2-byte scale
BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / INT4_GROUP}
PRECISIONS = {name: name for name in ("bf16", "int8", "int4")}
KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}

GPU_SHARE = 0.92  # of a GPU's memory may be filled; the rest absorbs fragments and peaks
GPU_OVERHEAD_BYTES = int(1.2 * GIB)  # per GPU: CUDA context, NCCL, activations, its own copy of embedding, routers and norms
HOST_SHARE = 0.8  # of a host's free memory, which others use too
HOST_OVERHEAD_BYTES = 256 * 2**20  # per CPU rank: activations and buffers
CHAT_TOKENS = 3072  # a typical chat at its end ...
MEAN_TOKENS = 1024  # ... and the context at which it is read in the mean, since chats start short
MOST_SLOTS, MOST_SLOTS_OF_HOST = 256, 32  # where none are asked for; a CPU's step takes longer with every chat
PREFILL_CHUNK = 512
LIKE_PRICE = 1.15  # a set-up with less than 15 % more or less bandwidth is no other choice

MODELS = {"8x7B": SHAPES["8x7b"], "8x22B": SHAPES["8x22b"]}


# ---- what is to be stored


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has, by what becomes of them. Experts and attention are quantised, the others never are."""

    experts: int
    attention: int
    embedding: int
    head: int
    routers_norms: int

    @property
    def total(self) -> int:
        return self.experts + self.attention + self.embedding + self.head + self.routers_norms


def parameters(model: ModelConfig) -> Parameters:
    queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    routers = model.n_experts if model.n_experts > 1 else 0  # a dense model chooses nothing
    return Parameters(
        experts=model.n_layers * model.n_experts * 3 * model.dim * model.hidden_dim,
        attention=model.n_layers * 2 * model.dim * (queries + keys),
        embedding=model.vocab_size * model.dim,
        head=model.vocab_size * model.dim,
        routers_norms=model.n_layers * model.dim * (routers + 2) + model.dim,
    )


def kept_bytes(precision: str) -> int:
    """Bytes of each number that is not quantised."""
    return 4 if precision == "fp32" else 2


def weights_bytes(model: ModelConfig, precision: str) -> int:
    """All weights, once. Scales of int8 and fp8 (one per output channel, below 0.1 %) are left out."""
    count = parameters(model)
    quantised = (count.experts + count.attention) * BYTES_PER_WEIGHT[precision]
    return round(quantised + (count.embedding + count.head + count.routers_norms) * kept_bytes(precision))


def copied_bytes(model: ModelConfig, precision: str) -> int:
    """What every rank holds whole: embedding, routers, norms."""
    count = parameters(model)
    return (count.embedding + count.routers_norms) * kept_bytes(precision)


def kv_bytes_per_token(model: ModelConfig, kv_dtype: str) -> int:
    """Keys and values of one position, over all ranks."""
    return model.kv_bytes_per_token(KV_BYTES[kv_dtype])


# ---- what there is to store it in


@dataclass(frozen=True)
class Memory:
    """What the ranks of one worker may fill together."""

    name: str  # of one GPU, or of the host
    bytes_each: int  # of one GPU; of the host as a whole where is_host
    ranks: int = 1
    share: float = GPU_SHARE
    overhead_bytes: int = GPU_OVERHEAD_BYTES  # per rank
    is_host: bool = False  # ranks share the memory of their host, and more ranks bring no more of it
    hosts: int = 1  # where is_host

    @property
    def parts(self) -> int:
        return self.hosts if self.is_host else self.ranks

    @property
    def usable_bytes(self) -> int:
        return int(self.parts * self.bytes_each * self.share) - self.ranks * self.overhead_bytes

    @property
    def label(self) -> str:
        return self.name if self.is_host else f"{self.ranks} × {self.name}"

    def __str__(self) -> str:
        return (
            f"{self.parts} × {self.bytes_each / GIB:.1f} GiB × {self.share:.0%} − {self.ranks} × {self.overhead_bytes / GIB:.1f} GiB "
            f"overhead = {self.usable_bytes / GIB:.1f} GiB"
        )


def host_memory(free_bytes: int, ranks: int, model: ModelConfig, precision: str, hosts: int = 1) -> Memory:
    """The memory of CPU ranks, from what each of their hosts has free before any weight is read."""
    overhead = HOST_OVERHEAD_BYTES + copied_bytes(model, precision)
    name = "this host's free memory" if hosts == 1 else f"the free memory of {hosts} hosts"
    return Memory(name, free_bytes, ranks, HOST_SHARE, overhead, is_host=True, hosts=hosts)


# ---- what fits


@dataclass(frozen=True)
class Wanted:
    """A model and how it is to be served."""

    name: str
    model: ModelConfig
    precision: str = "bf16"
    kv_dtype: str = "bf16"
    context: int = 32_768  # most tokens of one chat
    slots: int | None = None  # chats together; None: as many typical ones as fit
    chat_tokens: int = CHAT_TOKENS

    @property
    def typical_tokens(self) -> int:
        """A typical chat at its end, in whole blocks."""
        return _whole_blocks(min(self.chat_tokens, self.context))

    @property
    def full_tokens(self) -> int:
        return _whole_blocks(self.context)


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is divided: what a worker needs for max_batch_size and KV cache, and a person to decide."""

    weights_bytes: int
    usable_bytes: int
    kv_bytes_per_token: int
    room_tokens: int  # all that fit beside the weights, in whole blocks
    full_chats: int  # of the whole context, together
    typical_chats: int
    max_slots: int
    kv_tokens: int  # to reserve: the room, but no more than every slot can use

    @property
    def room_bytes(self) -> int:
        return self.usable_bytes - self.weights_bytes


class DoesNotFit(ModelError):
    """One sentence: what was asked, what it takes, what there is, and the nearest set-ups that fit."""

    def __init__(self, reason: str, nearest: Sequence[str]) -> None:
        self.reason, self.nearest = reason, tuple(nearest)
        super().__init__(f"{reason}; {'take ' + ', or '.join(nearest) if nearest else 'it needs a machine with more memory'}")


def plan_memory(wanted: Wanted, memory: Memory, precisions: Mapping[str, str] = PRECISIONS, context_flag: str = "--context") -> MemoryPlan:
    """Divide memory, before anything is loaded. Raises DoesNotFit.

    precisions: those that a refusal may propose, and how one asks for each; context_flag: how one asks for another context.
    """
    plan = _divide(wanted, memory)
    if plan.full_chats < 1:
        raise DoesNotFit(_reason(wanted, memory, plan), _nearest(wanted, memory, plan, precisions, context_flag))
    return plan


def _divide(wanted: Wanted, memory: Memory) -> MemoryPlan:
    weights, usable = weights_bytes(wanted.model, wanted.precision), memory.usable_bytes
    per_token = kv_bytes_per_token(wanted.model, wanted.kv_dtype)
    room = max(0, usable - weights) // (per_token * BLOCK_SIZE) * BLOCK_SIZE
    typical = room // wanted.typical_tokens
    slots = wanted.slots or max(1, min(typical, MOST_SLOTS_OF_HOST if memory.is_host else MOST_SLOTS))
    return MemoryPlan(
        weights_bytes=weights,
        usable_bytes=usable,
        kv_bytes_per_token=per_token,
        room_tokens=room,
        full_chats=room // wanted.full_tokens,
        typical_chats=typical,
        max_slots=slots,
        kv_tokens=min(room, slots * wanted.full_tokens),
    )


def _reason(wanted: Wanted, memory: Memory, plan: MemoryPlan) -> str:
    chat = wanted.full_tokens * plan.kv_bytes_per_token
    return (
        f"{wanted.name} in {wanted.precision} does not fit on {memory.label}: weights take {_gib(plan.weights_bytes)} and one chat of "
        f"{wanted.context:,} tokens {_gib(chat)}, {_gib(plan.weights_bytes + chat)} in all, but there are {memory}"
    )


def _nearest(wanted: Wanted, memory: Memory, plan: MemoryPlan, precisions: Mapping[str, str], context_flag: str) -> list[str]:
    """The longest context, the next precision, the next number of GPUs: whichever alone makes it fit."""
    found = [f"{context_flag} {plan.room_tokens}"] if plan.room_tokens >= PREFILL_CHUNK else []
    bits = BYTES_PER_WEIGHT[wanted.precision]
    for precision in sorted((p for p in precisions if BYTES_PER_WEIGHT[p] < bits), key=lambda p: -BYTES_PER_WEIGHT[p]):
        fewer = _divide(replace(wanted, precision=precision), memory)
        if fewer.full_chats:
            found.append(f"{precisions[precision]} ({_gib(fewer.room_bytes)} left for chats)")
            break
    for ranks in wanted.model.possible_ranks if not memory.is_host else []:
        more = _divide(wanted, replace(memory, ranks=ranks))
        if ranks > memory.ranks and more.full_chats:
            found.append(f"{ranks} × {memory.name} ({_gib(more.room_bytes)} left for chats)")
            break
    return found


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


# ---- how fast, at best


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    bandwidth_tb_s: float
    bf16_tflops: float
    fp8: bool
    source: str
    names: tuple[str, ...] = ()  # how the driver calls it


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind that share a model evenly; what they say to each other costs nothing here."""

    gpu: Gpu
    count: int

    @property
    def bytes_per_s(self) -> float:
        return self.count * self.gpu.bandwidth_tb_s * 1e12

    @property
    def flops_per_s(self) -> float:
        return self.count * self.gpu.bf16_tflops * 1e12

    def memory(self, share: float = GPU_SHARE) -> Memory:
        return Memory(self.gpu.name, int(self.gpu.memory_gib * GIB), self.count, share)


@dataclass(frozen=True)
class Pass:
    """One forward pass, and the shortest time that a machine can take for it."""

    tokens: int  # computed: one per chat in a decode step, a chunk's in a prefill
    bytes: float  # read: weights once, and the keys and values of every context
    flops: float
    by_bandwidth_s: float
    by_flops_s: float

    @property
    def seconds(self) -> float:
        return max(self.by_bandwidth_s, self.by_flops_s)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def intensity(self) -> float:
        """FLOPs per byte read."""
        return self.flops / self.bytes


def experts_read(model: ModelConfig, tokens: int) -> float:
    """Distinct experts of a layer that a batch needs in the mean, its tokens choosing evenly and apart: n·(1 − (1 − k/n)^tokens)."""
    return model.n_experts * (1 - (1 - model.experts_per_token / model.n_experts) ** tokens)


def weights_read_bytes(model: ModelConfig, precision: str, tokens: int) -> float:
    """Weights that a pass over so many tokens reads; of the embedding only single rows, which count for nothing."""
    count = parameters(model)
    experts = count.experts * experts_read(model, tokens) / model.n_experts
    return (experts + count.attention) * BYTES_PER_WEIGHT[precision] + (count.head + count.routers_norms) * kept_bytes(precision)


def flops_per_token(model: ModelConfig, context: float = 0) -> float:
    """Two per weight that a token meets, and four per head dimension and position that it attends to."""
    count = parameters(model)
    met = count.experts * model.experts_per_token / model.n_experts + count.attention + count.head
    return 2 * met + 4 * context * model.n_layers * model.n_heads * model.head_dim


def decode_step(wanted: Wanted, machine: Machine, batch: int, context: int = MEAN_TOKENS) -> Pass:
    """One token for each of batch chats that are context tokens long."""
    read = weights_read_bytes(wanted.model, wanted.precision, batch) + batch * context * kv_bytes_per_token(wanted.model, wanted.kv_dtype)
    return _pass(machine, batch, read, batch * flops_per_token(wanted.model, context))


def prefill_chunks(wanted: Wanted, machine: Machine, prompt_tokens: int) -> list[Pass]:
    """A prompt in chunks of PREFILL_CHUNK, alone on the machine."""
    passes = []
    for start in range(0, prompt_tokens, PREFILL_CHUNK):
        tokens = min(PREFILL_CHUNK, prompt_tokens - start)
        read = weights_read_bytes(wanted.model, wanted.precision, tokens)
        read += (start + tokens) * kv_bytes_per_token(wanted.model, wanted.kv_dtype)
        passes.append(_pass(machine, tokens, read, tokens * flops_per_token(wanted.model, start + tokens / 2)))
    return passes


def prefill_s(chunks: Iterable[Pass], bandwidth_share: float = 1.0, flops_share: float = 1.0) -> float:
    """Time to the first token, where only these shares of bandwidth and FLOP/s are reached."""
    return sum(max(chunk.by_bandwidth_s / bandwidth_share, chunk.by_flops_s / flops_share) for chunk in chunks)


def _pass(machine: Machine, tokens: int, read: float, flops: float) -> Pass:
    return Pass(tokens, read, flops, read / machine.bytes_per_s, flops / machine.flops_per_s)


# ---- what else one could buy


@dataclass(frozen=True)
class Setup:
    machine: Machine
    wanted: Wanted
    plan: MemoryPlan


def neighbours(
    wanted: Wanted, machine: Machine, gpus: Iterable[Gpu], users: int, share: float = GPU_SHARE
) -> tuple[Setup | None, Setup | None]:
    """The next cheaper and the next dearer set-up that hold so many typical chats, in the precision asked for or fewer bits.

    Ordered by memory bandwidth in all, which prices follow roughly; they themselves change too often to stand here.
    """
    here = machine.bytes_per_s
    others = [Machine(gpu, count) for gpu in gpus for count in wanted.model.possible_ranks]
    cheaper = sorted((m for m in others if m.bytes_per_s * LIKE_PRICE <= here), key=lambda m: (-m.bytes_per_s, m.count))
    dearer = sorted((m for m in others if m.bytes_per_s >= here * LIKE_PRICE), key=lambda m: (m.bytes_per_s, m.count))
    return _first_fitting(wanted, cheaper, users, share), _first_fitting(wanted, dearer, users, share)


def _first_fitting(wanted: Wanted, machines: Iterable[Machine], users: int, share: float) -> Setup | None:
    for machine in machines:
        for precision in _precisions_down(wanted.precision, machine.gpu):
            asked = replace(wanted, precision=precision)
            plan = _divide(asked, machine.memory(share))
            if plan.full_chats and plan.typical_chats >= users:
                return Setup(machine, asked, plan)
    return None


def _precisions_down(precision: str, gpu: Gpu) -> list[str]:
    """The precision asked for and those with fewer bits, as this GPU can run them."""
    one_byte = "fp8" if gpu.fp8 else "int8"
    first = "int8" if precision == "fp8" and not gpu.fp8 else precision
    return [first, *(p for p in ("bf16", one_byte, "int4") if BYTES_PER_WEIGHT[p] < BYTES_PER_WEIGHT[precision])]
