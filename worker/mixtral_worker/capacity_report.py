"""Figures of a capacity plan with the formula of each, as a table, JSON and explanations.

Decides which figures are shown, their wording and rounding. All arithmetic of the machine is capacity.py's; what is expected beside the
ceilings is a share of them that others have published for their engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape as escape_tags
from rich.table import Table

from mixtral_worker import capacity
from mixtral_worker.blocks import BLOCK_SIZE
from mixtral_worker.capacity import GIB, Memory, MemoryPlan, Pass, Setup, Wanted

SPEED_SHARE = 0.50
SPEED_SHARE_OF_EIGHT = 0.36
SPEED_SOURCE = (
    "Published at B = 1 and divided by the ceiling here: TensorRT-LLM at Baseten 52 % (1 × A100-80GB int8, 81 tok/s) and 47 % (2, float16, "
    "75 tok/s); gpt-fast 62 % (1, int8, 97.9), 61 % (2, bf16, 96.7), 49 % (4, bf16, 155.4), 36 % (8, bf16, 227.8)"
)
PREFILL_SHARE = 0.33
PREFILL_SOURCE = (
    "Published: TensorRT-LLM at Baseten: 127 ms for 512 tokens on 1 × A100-80GB in int8 (13.1 TFLOP at 312 TFLOP/s would take 42 ms)"
)
NOT_MEASURED = (
    "Computed, not measured: ceilings are data-sheet peaks with free communication; expected is a share of them that others published."
)
NEIGHBOURS = (
    f"cheaper, dearer: the nearest machines with at least {capacity.LIKE_PRICE - 1:.0%} less or more memory bandwidth in all, which prices "
    "follow roughly, that hold the users' typical chats and one of full length; their figures by the same formulas"
)
BATCHES, LARGE_BATCHES = (1, 8, 32), (128, 256)


def speed_share(gpus: int) -> float:
    """What of a decode step's ceiling to expect of an engine. SPEED_SOURCE says whence."""
    return SPEED_SHARE if gpus <= 4 else SPEED_SHARE_OF_EIGHT


@dataclass(frozen=True)
class Figure:
    """One number, and where it comes from: formula in words, sum with the values (plain arithmetic with × − / floor min max)."""

    key: str
    label: str
    value: float
    unit: str
    formula: str
    sum: str

    @property
    def text(self) -> str:
        if isinstance(self.value, int) or self.value >= 100:
            return f"{self.value:,.0f}"
        return f"{self.value:.1f}" if self.value >= 10 else f"{self.value:.3g}"


@dataclass(frozen=True)
class Batch:
    """So many chats decoded together; where there are fewer slots, its figures are not shown."""

    size: int
    step: Pass
    fits: bool
    figures: tuple[Figure, ...]

    def __getitem__(self, key: str) -> Figure:
        return next(figure for figure in self.figures if figure.key == key)


@dataclass(frozen=True)
class Report:
    setup: Setup
    memory: Memory
    users: int
    prompt_tokens: int
    mean_tokens: int
    share: float
    figures: tuple[Figure, ...]
    batches: tuple[Batch, ...]
    cheaper: Setup | None
    dearer: Setup | None


def build(
    setup: Setup,
    memory: Memory,
    others: tuple[Setup | None, Setup | None],
    *,
    users: int,
    prompt_tokens: int,
    mean_tokens: int,
    share: float,
) -> Report:
    mean_tokens = min(mean_tokens, setup.wanted.context)
    figures = (*_storage(setup.wanted, setup.plan, memory), *_prefill(setup, prompt_tokens, share))
    sizes = _batch_sizes(setup.plan.max_slots, users)
    batches = tuple(_batch(setup, size, mean_tokens, share) for size in sizes)
    return Report(setup, memory, users, prompt_tokens, mean_tokens, share, figures, batches, *others)


def _batch_sizes(slots: int, users: int) -> list[int]:
    return sorted({*BATCHES, users, *(size for size in LARGE_BATCHES if size <= slots)})


# ---- figures


def _storage(wanted: Wanted, plan: MemoryPlan, memory: Memory) -> list[Figure]:
    model, count = wanted.model, capacity.parameters(wanted.model)
    kept, bits = capacity.kept_bytes(wanted.precision), capacity.BYTES_PER_WEIGHT[wanted.precision]
    quantised, whole = count.experts + count.attention, count.embedding + count.head + count.routers_norms
    parts, block = 1 if memory.is_host else memory.ranks, BLOCK_SIZE
    per_token, room = plan.kv_bytes_per_token / 1024, plan.room_bytes / GIB
    limit = capacity.MOST_SLOTS if wanted.slots is None else wanted.slots
    return [
        Figure(
            "parameters_b",
            "parameters",
            count.total / 1e9,
            "B",
            "experts + attention + embedding + head + routers and norms, in 10^9",
            " + ".join(_n(part / 1e9) for part in (count.experts, count.attention, count.embedding, count.head, count.routers_norms)),
        ),
        Figure(
            "weights_gib",
            f"weights in {wanted.precision}",
            plan.weights_bytes / GIB,
            "GiB",
            f"(experts and attention) × {bits:g} bytes + (embedding, head, routers, norms) × {kept} bytes, in GiB",
            f"({_n(quantised)} × {bits:g} + {_n(whole)} × {kept}) / 1024 / 1024 / 1024",
        ),
        Figure(
            "usable_gib",
            "memory that may be filled",
            plan.usable_bytes / GIB,
            "GiB",
            "GPUs × memory of one × share − GPUs × overhead (CUDA context, activations, NCCL, own copy of embedding, routers, norms)",
            f"{parts} × {_n(memory.bytes_each / GIB)} × {memory.share:g} − {memory.ranks} × {_n(memory.overhead_bytes / GIB)}",
        ),
        Figure(
            "kv_gib",
            "left for KV cache",
            room,
            "GiB",
            "memory that may be filled − weights",
            f"{_n(plan.usable_bytes / GIB)} − {_n(plan.weights_bytes / GIB)}",
        ),
        Figure(
            "kv_kib_per_token",
            f"KV per token in {wanted.kv_dtype}",
            per_token,
            "KiB",
            "keys and values × layers × KV heads × head size × bytes, in KiB",
            f"2 × {model.n_layers} × {model.n_kv_heads} × {model.head_dim} × {capacity.KV_BYTES[wanted.kv_dtype]} / 1024",
        ),
        Figure(
            "kv_tokens",
            "tokens of all chats together",
            plan.room_tokens,
            "tokens",
            f"what is left / KV per token, in whole blocks of {block}",
            f"floor({plan.room_bytes} / {plan.kv_bytes_per_token} / {block}) × {block}",
        ),
        Figure(
            "full_length_chats",
            f"chats of full length ({wanted.context:,})",
            plan.full_chats,
            "chats",
            "tokens of all chats / context in whole blocks",
            f"floor({plan.room_tokens} / {wanted.full_tokens})",
        ),
        Figure(
            "typical_chats",
            f"typical chats ({min(wanted.chat_tokens, wanted.context):,})",
            plan.typical_chats,
            "chats",
            "tokens of all chats / tokens of a typical chat at its end, in whole blocks",
            f"floor({plan.room_tokens} / {wanted.typical_tokens})",
        ),
        Figure(
            "max_batch_size",
            "slots (max_batch_size)",
            plan.max_slots,
            "slots",
            f"typical chats, but at most {limit} and at least 1",
            f"max(1, min({plan.typical_chats}, {limit}))",
        ),
    ]


def _prefill(setup: Setup, prompt_tokens: int, of_bandwidth: float) -> list[Figure]:
    chunks = capacity.prefill_chunks(setup.wanted, setup.machine, prompt_tokens)
    bandwidth, flops = setup.machine.bytes_per_s, setup.machine.flops_per_s
    read, done = sum(chunk.bytes for chunk in chunks), sum(chunk.flops for chunk in chunks)

    def figure(key: str, label: str, shares: tuple[float, float], words: str) -> Figure:
        seconds = capacity.prefill_s(chunks, *shares)
        terms = " + ".join(
            f"max({_n(chunk.bytes)} / {_n(bandwidth)} / {shares[0]:g}, {_n(chunk.flops)} / {_n(flops)} / {shares[1]:g})" for chunk in chunks
        )
        return Figure(key, f"{label}, {prompt_tokens:,} tokens", seconds * 1e3, "ms", words, f"({terms}) × 1000")

    words = (
        f"per chunk of {capacity.PREFILL_CHUNK} tokens the longer of bytes / bandwidth and FLOPs / peak FLOP/s, nobody else being served; "
        f"{_n(read / 1e9)} GB and {_n(done / 1e12)} TFLOP in all"
    )
    share = f"the same at {of_bandwidth:.0%} of the bandwidth and {PREFILL_SHARE:.0%} of the FLOP/s"
    return [
        figure("ttft_ceiling_ms", "first token at best", (1.0, 1.0), words),
        figure("ttft_expected_ms", "first token expected", (of_bandwidth, PREFILL_SHARE), share),
    ]


def _batch(setup: Setup, size: int, context: int, share: float) -> Batch:
    wanted, machine = setup.wanted, setup.machine
    model, count = wanted.model, capacity.parameters(wanted.model)
    step = capacity.decode_step(wanted, machine, size, context)
    read, bits = capacity.experts_read(model, size), capacity.BYTES_PER_WEIGHT[wanted.precision]
    whole, kv = (count.head + count.routers_norms) * capacity.kept_bytes(wanted.precision), size * context * setup.plan.kv_bytes_per_token
    per_user = 1 / step.seconds
    figures = (
        Figure(
            "experts_read",
            "experts read per layer",
            read,
            "experts",
            "n × (1 − (1 − k / n)^B): distinct experts of evenly choosing tokens",
            f"{model.n_experts} × (1 − (1 − {model.experts_per_token} / {model.n_experts})^{size})",
        ),
        Figure(
            "step_gb",
            "read per step",
            step.bytes / 1e9,
            "GB",
            f"(experts × share read + attention) × {bits:g} bytes + head, routers, norms + B × {context:,} tokens × KV per token",
            f"(({_n(count.experts)} × {_n(read)} / {model.n_experts} + {_n(count.attention)}) × {bits:g} + {_n(whole)} + {_n(kv)}) / 1e9",
        ),
        Figure(
            "step_tflop",
            "computed per step",
            step.flops / 1e12,
            "TFLOP",
            "B × FLOPs per token: 2 per weight met, 4 per head dimension and position attended to",
            f"{size} × {_n(step.flops / size)} / 1e12",
        ),
        Figure(
            "step_ms",
            "step at best",
            step.seconds * 1e3,
            "ms",
            "the longer of bytes / bandwidth and FLOPs / peak FLOP/s",
            f"max({_n(step.bytes)} / {_n(machine.bytes_per_s)}, {_n(step.flops)} / {_n(machine.flops_per_s)}) × 1000",
        ),
        Figure("per_user_ceiling", "tok/s per user at best", per_user, "tok/s", "one token per step", f"1000 / {_n(step.seconds * 1e3)}"),
        Figure("total_ceiling", "tok/s in all at best", size * per_user, "tok/s", "B tokens per step", f"{size} × {_n(per_user)}"),
        Figure(
            "per_user_expected",
            "tok/s per user expected",
            per_user * share,
            "tok/s",
            f"ceiling × {share:.0%}",
            f"{_n(per_user)} × {share:g}",
        ),
        Figure(
            "total_expected",
            "tok/s in all expected",
            size * per_user * share,
            "tok/s",
            f"ceiling × {share:.0%}",
            f"{_n(size * per_user)} × {share:g}",
        ),
    )
    return Batch(size, step, size <= setup.plan.max_slots, figures)


def _n(value: float) -> str:
    return f"{value:.6g}"


# ---- for people


def print_table(report: Report, console: Console) -> None:
    wanted = report.setup.wanted
    console.print(f"[bold]{escape_tags(wanted.name)} in {wanted.precision} on {report.memory.label}[/bold]", highlight=False)
    store = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    store.add_column()
    store.add_column(justify="right")
    store.add_column()
    for figure in report.figures:
        store.add_row(figure.label, figure.text, figure.unit)
    console.print(store, highlight=False)
    speed = Table(
        box=box.SIMPLE, pad_edge=False, title=f"tokens per second at {report.mean_tokens:,} tokens of context", title_justify="left"
    )
    for heading in (
        "chats at once",
        "per user at best",
        "in all at best",
        "per user expected",
        "in all expected",
        "read per step, GB",
        "bound by",
    ):
        speed.add_column(heading, justify="right")
    for batch in report.batches:
        speed.add_row(*_speed_row(batch))
    console.print(speed, highlight=False)
    for line in (*_users_lines(report), *_neighbour_lines(report), NOT_MEASURED):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _speed_row(batch: Batch) -> list[str]:
    keys = ("per_user_ceiling", "total_ceiling", "per_user_expected", "total_expected", "step_gb")
    if not batch.fits:
        return [str(batch.size), *("–" for _ in keys), "slots"]
    return [str(batch.size), *(batch[key].text for key in keys), _bound(batch.step)]


def _bound(step: Pass) -> str:
    return "bandwidth" if step.by_bandwidth_s >= step.by_flops_s else "FLOP/s"


def _users_lines(report: Report) -> list[str]:
    plan, users = report.setup.plan, report.users
    served = min(users, plan.max_slots)
    waiting = f"{served:,} served at once, {users - served:,} wait in the queue"
    lines = [f"{_counted(users, 'user')}: " + ("all served at once" if served == users else waiting)]
    if served > plan.full_chats:
        lines.append(f"only {plan.full_chats} chats can grow to {report.setup.wanted.context:,} tokens at the same time")
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _neighbour_lines(report: Report) -> list[str]:
    lines = []
    for word, setup in (("cheaper", report.cheaper), ("dearer", report.dearer)):
        if setup is None:
            lines.append(f"{word}: none of the known GPUs holds {_counted(report.users, 'typical chat')} of it")
            continue
        one, many = (capacity.decode_step(setup.wanted, setup.machine, size, report.mean_tokens) for size in (1, report.users))
        speeds = f"{one.tokens_per_s:,.0f} tok/s for one user at best"
        if report.users > 1:
            speeds += f", {many.tokens_per_s:,.0f} for {report.users} in all"
        lines.append(
            f"{word}: {_setup_name(setup)}: {setup.plan.full_chats:,} full-length or {setup.plan.typical_chats:,} typical chats, {speeds}"
        )
    return lines


def _setup_name(setup: Setup) -> str:
    return f"{setup.machine.count} × {setup.machine.gpu.name} in {setup.wanted.precision}"


def print_explanations(report: Report, console: Console) -> None:
    """Each number shown, with its formula and the values in it."""
    gpu = report.setup.machine.gpu
    lines = [
        f"{gpu.name}: {gpu.memory_gib:g} GiB, {gpu.bandwidth_tb_s:g} TB/s, {gpu.bf16_tflops:g} TFLOP/s dense bf16 ({gpu.source})",
        f"expected tok/s: {report.share:.0%} of the ceiling at every B. {SPEED_SOURCE}",
        f"expected first token: {PREFILL_SHARE:.0%} of the peak FLOP/s. {PREFILL_SOURCE}",
        "",
    ]
    for figure in report.figures:
        lines += _explained(figure)
    for batch in report.batches:
        if batch.fits:
            lines.append(f"-- {batch.size} chats at once")
            for figure in batch.figures:
                lines += _explained(figure)
        else:
            lines.append(f"-- {batch.size} chats at once: – because there are {report.setup.plan.max_slots} slots")
    lines.append(NEIGHBOURS)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _explained(figure: Figure) -> list[str]:
    return [f"{figure.label}: {figure.text} {figure.unit}", f"    {figure.formula}", f"    = {figure.sum}"]


# ---- for programs


def as_json(report: Report, *, explain: bool) -> dict[str, Any]:
    wanted, gpu = report.setup.wanted, report.setup.machine.gpu
    return {
        "fits": True,
        "measured": False,
        "model": wanted.name,
        "gpu": gpu.name,
        "gpus": report.setup.machine.count,
        "precision": wanted.precision,
        "kv_dtype": wanted.kv_dtype,
        "context": wanted.context,
        "users": report.users,
        "users_at_once": min(report.users, report.setup.plan.max_slots),
        "prompt_tokens": report.prompt_tokens,
        "mean_tokens": report.mean_tokens,
        "speed_share": report.share,
        **{figure.key: _rounded(figure.value) for figure in report.figures},
        "batches": [
            {"batch": batch.size, "fits": batch.fits, **{f.key: _rounded(f.value) if batch.fits else None for f in batch.figures}}
            for batch in report.batches
        ],
        "cheaper": _neighbour_json(report.cheaper),
        "dearer": _neighbour_json(report.dearer),
        **({"explanations": _explanations_json(report)} if explain else {}),
        "note": NOT_MEASURED,
    }


def _explanations_json(report: Report) -> dict[str, dict[str, str]]:
    named = {figure.key: figure for figure in report.figures}
    named |= {f"batches.{batch.size}.{figure.key}": figure for batch in report.batches if batch.fits for figure in batch.figures}
    return {key: {"formula": figure.formula, "sum": figure.sum} for key, figure in named.items()}


def _neighbour_json(setup: Setup | None) -> dict[str, Any] | None:
    if setup is None:
        return None
    plan, machine = setup.plan, setup.machine
    chats = {"full_length_chats": plan.full_chats, "typical_chats": plan.typical_chats}
    return {"gpu": machine.gpu.name, "gpus": machine.count, "precision": setup.wanted.precision, **chats}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, 4)
