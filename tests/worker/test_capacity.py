"""The planner's arithmetic against tables worked out elsewhere, its refusals, and what `python -m worker capacity` shows of both."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_worker import capacity, capacity_cli, capacity_report
from mixtral_worker.blocks import BLOCK_SIZE
from mixtral_worker.capacity import GIB, DoesNotFit, Machine, Memory, MemoryPlan, Wanted, plan_memory
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.settings import SettingsRefused

ROOT = Path(__file__).resolve().parents[2]
GPUS = capacity_cli.read_gpus(capacity_cli.GPU_TABLE)
WITHIN = 0.02
A100S = ["--gpu", "A100-80GB", "--gpus", "2"]

# model, GPUs, share of their memory, precision | GiB free for KV | full chats of 8K, of 32K |
# tok/s per user at B = 1 | per user and in all at B = 8 | at B = 32; all with 1K of context read, ideal bandwidth and free communication
TABLE = """
8x7B  1 RTX6000Ada 0.92 int4 |  19.7 |  19  4 | 139 |  42  335 |  34 1078
8x7B  2 A6000      0.92 int8 |  41.2 |  41 10 | 118 |  35  284 |  30  963
8x7B  4 A6000      0.92 bf16 |  83.0 |  83 20 | 120 |  36  288 |  32 1009
8x7B  2 RTX6000Ada 0.97 bf16 |   2.8 |   2  0 |  75 |   –    – |   –    –
8x7B  4 RTX6000Ada 0.92 bf16 |  83.0 |  83 20 | 150 |  45  361 |  39 1261
8x7B  1 A100-80GB  0.92 int8 |  27.9 |  27  6 | 157 |  47  377 |  40 1279
8x7B  2 A100-80GB  0.92 bf16 |  56.3 |  56 14 | 159 |  48  383 |  42 1339
8x7B  1 H100       0.92 fp8  |  27.9 |  27  6 | 257 |  77  619 |  66 2101
8x7B  2 H100       0.92 bf16 |  56.3 |  56 14 | 261 |  79  629 |  69 2201
8x7B  1 H200       0.92 bf16 |  40.4 |  40 10 | 187 |  56  451 |  49 1577
8x7B  1 H200       0.92 fp8  |  83.7 |  83 20 | 369 | 111  887 |  94 3011
8x7B  1 H200       0.92 int8 |  83.7 |  83 20 | 369 | 111  887 |  94 3011
8x7B  1 H200       0.92 int4 | 104.6 | 104 26 | 695 | 209 1673 | 168 5389
8x22B 4 A100-80GB  0.92 bf16 |  24.7 |  14  3 | 104 |  32  255 |  28  905
8x22B 4 H100       0.92 fp8  | 155   |  88 22 | 340 | 104  831 |  90 2893
"""
ROWS = TABLE.strip().splitlines()


def wanted(model: str = "8x7B", precision: str = "bf16", context: int = 8192) -> Wanted:
    return Wanted(model, capacity.MODELS[model], precision, context=context)


def report_of(*flags: str) -> dict[str, Any]:
    """The JSON of a plan, without the command around it."""
    return capacity_report.as_json(built(*flags), explain=True)


def built(*flags: str) -> capacity_report.Report:
    return capacity_cli.plan(capacity_cli.parser().parse_args(flags))


# ---- against tables worked out elsewhere


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_planning_table_comes_out_within_two_percent(row: str) -> None:
    setup, free, chats, *speeds = (part.split() for part in row.split("|"))
    model, count, gpu, share, precision = setup
    flags = ["--model", model, "--gpu", gpu, "--gpus", count, "--precision", precision, "--memory_share", share]
    shown = report_of(*flags, "--context", "8192")
    assert shown["kv_gib"] == pytest.approx(float(free[0]), rel=WITHIN)
    assert [shown["full_length_chats"], shown["kv_tokens"] // 32_768] == [int(count) for count in chats]
    batches = {batch["batch"]: batch for batch in shown["batches"]}
    assert batches[1]["per_user_ceiling"] == pytest.approx(float(speeds[0][0]), rel=WITHIN)
    for size, (per_user, total) in zip((8, 32), speeds[1:], strict=True):
        batch = batches[size]
        if per_user == "–":
            assert (batch["fits"], batch["per_user_ceiling"], batch["total_ceiling"]) == (False, None, None)
        else:
            assert batch["per_user_ceiling"] == pytest.approx(float(per_user), rel=WITHIN)
            assert batch["total_ceiling"] == pytest.approx(float(total), rel=WITHIN)


@pytest.mark.parametrize(
    ("model", "gib", "kv_kib", "gflop", "billions"),
    [("8x7B", (87.0, 43.8, 22.8), 128, 25.5, 46.70), ("8x22B", (261.9, 131.4, 68.1), 224, 77.9, 140.6)],
)
def test_sizes_of_both_mixtrals(model: str, gib: tuple[float, ...], kv_kib: int, gflop: float, billions: float) -> None:
    shape = capacity.MODELS[model]
    for precisions, size in zip((("bf16",), ("int8", "fp8"), ("int4",)), gib, strict=True):
        assert [capacity.weights_bytes(shape, p) / GIB for p in precisions] == pytest.approx([size] * len(precisions), rel=0.003)
    assert capacity.kv_bytes_per_token(shape, "bf16") == kv_kib * 1024
    assert capacity.kv_bytes_per_token(shape, "fp8") == kv_kib * 512
    assert capacity.flops_per_token(shape) / 1e9 == pytest.approx(gflop, rel=0.002)
    assert capacity.parameters(shape).total / 1e9 == pytest.approx(billions, rel=0.001)


def test_dense_relatives_have_the_parameters_that_their_makers_count() -> None:
    mistral_7b = ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, n_experts=1, experts_per_token=1)
    llama_2_70b = ModelConfig(8192, 80, 64, 8, 128, 28672, 32000, n_experts=1, experts_per_token=1)
    assert [capacity.parameters(shape).total for shape in (mistral_7b, llama_2_70b)] == [7_241_732_096, 68_976_648_192]
    assert capacity.experts_read(mistral_7b, 8) == 1, "a dense layer is read once, whatever the batch"


@pytest.mark.parametrize(
    ("precision", "gigabytes"),
    [
        ("bf16", (25.5, 42.4, 64.6, 84.1, 92.2, 93.1)),
        ("int8", (12.9, 21.4, 32.5, 42.2, 46.3, 46.7)),
        ("int4", (6.8, 11.1, 16.9, 21.9, 24.0, 24.2)),
    ],
)
def test_weights_read_per_step_grow_with_the_experts_that_a_batch_meets(precision: str, gigabytes: tuple[float, ...]) -> None:
    shape = capacity.MODELS["8x7B"]
    read = [capacity.weights_read_bytes(shape, precision, batch) / 1e9 for batch in (1, 2, 4, 8, 16, 32)]
    assert read == pytest.approx(gigabytes, rel=WITHIN)
    assert [round(capacity.experts_read(shape, batch), 2) for batch in (1, 2, 4, 8, 16)] == [2, 3.5, 5.47, 7.2, 7.92]


@pytest.mark.parametrize(("gpu", "ms", "bound_by_bandwidth_under"), [("A100-80GB", 84, 280), ("H200", 26, 380)])
def test_prefill_of_a_chunk_at_half_the_peak_and_where_bandwidth_stops_to_bound_it(
    gpu: str, ms: float, bound_by_bandwidth_under: int
) -> None:
    machine = Machine(GPUS[gpu], 1)
    chunk = capacity.prefill_chunks(wanted(), machine, 512)
    assert capacity.prefill_s(chunk, flops_share=0.5) * 1000 == pytest.approx(ms, abs=0.6)
    for tokens, bound in ((bound_by_bandwidth_under * 0.95, True), (bound_by_bandwidth_under * 1.05, False)):
        (part,) = capacity.prefill_chunks(wanted(), machine, round(tokens))
        assert (part.by_bandwidth_s > part.by_flops_s / 0.5) is bound


# Table 1 of AIME's article on deploying Mixtral: "87GB" and "262GB", in GiB and bf16.
@pytest.mark.parametrize(("model", "minimum_gib", "cards"), [("8x7B", 87, ("A6000", "RTX6000Ada")), ("8x22B", 262, ("A100-80GB", "H100"))])
def test_minimum_memory_and_gpus_of_the_aime_article(model: str, minimum_gib: int, cards: tuple[str, ...]) -> None:
    assert round(capacity.weights_bytes(capacity.MODELS[model], "bf16") / GIB) == minimum_gib
    whole = wanted(model, context=capacity.MODELS[model].max_seq_len)
    for card in cards:
        fitting = [count for count in (1, 2, 4, 8) if fits(whole, Machine(GPUS[card], count).memory())]
        assert fitting == [4, 8], f"the article takes 4 × {card}"


def test_two_rtx_6000_ada_hold_8x7b_with_8k_of_context_but_not_with_32k_as_the_article_says() -> None:
    memory = Machine(GPUS["RTX6000Ada"], 2).memory(share=0.97)
    assert fits(wanted(context=8192), memory)
    assert not fits(wanted(context=32_768), memory)


def fits(asked: Wanted, memory: Memory) -> bool:
    try:
        plan_memory(asked, memory)
    except DoesNotFit:
        return False
    return True


def test_expected_speed_is_the_share_of_our_ceilings_that_others_published() -> None:
    a100 = GPUS["A100-80GB"]
    published = [("52", 1, "int8", 81), ("47", 2, "bf16", 75), ("62", 1, "int8", 97.92), ("61", 2, "bf16", 96.67)]
    published += [("49", 4, "bf16", 155.35), ("36", 8, "bf16", 227.82)]
    for percent, count, precision, tokens_per_s in published:
        share = tokens_per_s / capacity.decode_step(wanted(precision=precision), Machine(a100, count), 1).tokens_per_s
        assert share * 100 == pytest.approx(float(percent), abs=0.6)
        assert f"{percent} %" in capacity_report.SPEED_SOURCE
    (chunk,) = capacity.prefill_chunks(wanted(precision="int8"), Machine(a100, 1), 512)
    assert chunk.by_flops_s / 0.127 == pytest.approx(capacity_report.PREFILL_SHARE, abs=0.005)


# ---- the same numbers as the worker's


@pytest.mark.parametrize("shape", ["grouped", "wide_heads", "no_groups"])
def test_weights_are_those_that_a_checkpoint_holds(shape: str, checkpoints: dict[str, Path]) -> None:
    with (checkpoints[shape] / "consolidated.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    stored = sum(end - begin for name, tensor in header.items() if name != "__metadata__" for begin, end in [tensor["data_offsets"]])
    assert capacity.weights_bytes(ModelConfig.read(checkpoints[shape]), "fp32") == stored


def test_what_each_gpu_holds_a_copy_of_is_less_than_half_of_the_overhead_kept_for_it() -> None:
    assert all(capacity.copied_bytes(shape, "bf16") < capacity.GPU_OVERHEAD_BYTES / 2 for shape in capacity.MODELS.values())


shapes = st.builds(
    lambda heads, groups, **rest: ModelConfig(n_heads=heads * groups, n_kv_heads=heads, experts_per_token=1, **rest),
    heads=st.sampled_from([1, 2, 4, 8]),
    groups=st.integers(1, 4),
    dim=st.sampled_from([64, 256, 4096]),
    n_layers=st.integers(1, 60),
    head_dim=st.sampled_from([8, 64, 128]),
    hidden_dim=st.integers(16, 15_000),
    vocab_size=st.integers(16, 33_000),
    n_experts=st.integers(1, 8),
)


@given(
    shape=shapes,
    precision=st.sampled_from(sorted(capacity.BYTES_PER_WEIGHT)),
    kv_dtype=st.sampled_from(sorted(capacity.KV_BYTES)),
    context=st.integers(2, 70_000),
    slots=st.none() | st.integers(1, 512),
    memory_mib=st.integers(16, 300_000),
    ranks=st.sampled_from([1, 2, 4, 8]),
    is_host=st.booleans(),
)
def test_plan_never_fills_more_than_there_is_and_a_refusal_proposes_only_what_fits(
    shape: ModelConfig, precision: str, kv_dtype: str, context: int, slots: int | None, memory_mib: int, ranks: int, is_host: bool
) -> None:
    asked = Wanted("it", shape, precision, kv_dtype, context, slots)
    memory = Memory("card", memory_mib * 2**20, ranks, 0.9, 64 * 2**20, is_host)
    try:
        plan = plan_memory(asked, memory)
    except DoesNotFit as refused:
        for proposal in refused.nearest:
            assert fits(*as_proposed(proposal, asked, memory)), proposal
        return
    assert plan.weights_bytes + plan.kv_tokens * plan.kv_bytes_per_token <= memory.usable_bytes
    assert plan.kv_tokens >= context, "one chat of full length must fit"
    assert plan.kv_tokens % BLOCK_SIZE == 0
    assert 1 <= plan.max_slots <= (slots or capacity.MOST_SLOTS)


def as_proposed(proposal: str, asked: Wanted, memory: Memory) -> tuple[Wanted, Memory]:
    if context := re.fullmatch(r"--context (\d+)", proposal):
        return replace(asked, context=int(context[1])), memory
    if ranks := re.match(r"(\d+) × card ", proposal):
        return asked, replace(memory, ranks=int(ranks[1]))
    return replace(asked, precision=proposal.split()[0]), memory


# ---- refusals and start-up


def test_what_cannot_fit_is_said_with_the_numbers_and_the_nearest_that_fits() -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan_memory(wanted(context=32_768), Machine(GPUS["RTX6000Ada"], 2).memory())
    assert str(refused.value) == (
        "8x7B in bf16 does not fit on 2 × RTX6000Ada: weights take 87.0 GiB and one chat of 32,768 tokens 4.0 GiB, 91.0 GiB in all, "
        "but there are 2 × 47.5 GiB × 92% − 2 × 1.2 GiB overhead = 85.0 GiB; "
        "take int8 (41.3 GiB left for chats), or 4 × RTX6000Ada (83.0 GiB left for chats)"
    )


def test_where_weights_fit_and_a_full_chat_does_not_the_longest_context_is_proposed_first() -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan_memory(wanted(context=32_768), Machine(GPUS["RTX6000Ada"], 2).memory(share=0.97))
    assert refused.value.nearest[0] == "--context 22592"


def test_only_precisions_that_the_caller_can_run_are_proposed() -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan_memory(wanted(), Machine(GPUS["H100"], 1).memory(), precisions={"bf16": "bf16"})
    assert refused.value.nearest == ("2 × H100 (56.3 GiB left for chats)",)


def test_where_nothing_helps_the_refusal_says_so() -> None:
    with pytest.raises(DoesNotFit, match="it needs a machine with more memory") as refused:
        plan_memory(wanted("8x22B"), Machine(replace(GPUS["L4"], memory_gib=8), 1).memory())
    assert refused.value.nearest == ()


def small_plan(checkpoint: Path, *, slots: int | None, memory_mib: int, ranks: int = 1) -> MemoryPlan:
    shape = ModelConfig.read(checkpoint)
    asked = Wanted("small", shape, "fp32", "fp32", context=1024, slots=slots)
    return plan_memory(asked, capacity.host_memory(memory_mib * 2**20, ranks, shape, "fp32"))


def test_a_small_model_reserves_no_more_kv_than_its_slots_can_use(checkpoint: Path) -> None:
    plan = small_plan(checkpoint, slots=32, memory_mib=8192)
    assert (plan.max_slots, plan.kv_tokens) == (32, 32 * 1024)
    assert plan.room_tokens > plan.kv_tokens


def test_slots_are_those_asked_for_or_as_many_as_typical_chats_fit(checkpoint: Path) -> None:
    plan = small_plan(checkpoint, slots=None, memory_mib=325)
    assert plan.max_slots == plan.typical_chats == plan.room_tokens // 1024 < capacity.MOST_SLOTS_OF_HOST
    assert small_plan(checkpoint, slots=None, memory_mib=8192).max_slots == capacity.MOST_SLOTS_OF_HOST
    more = small_plan(checkpoint, slots=200, memory_mib=325)
    assert (more.max_slots, more.kv_tokens) == (200, plan.room_tokens), "short chats may run together, long ones take turns"
    card = plan_memory(wanted(context=4096), Machine(GPUS["A100-80GB"], 8).memory())
    assert card.max_slots == capacity.MOST_SLOTS < card.typical_chats


def test_each_host_brings_its_memory(checkpoint: Path) -> None:
    shape = ModelConfig.read(checkpoint)
    one, two = (capacity.host_memory(8 * GIB, 4, shape, "fp32", hosts) for hosts in (1, 2))
    assert two.usable_bytes - one.usable_bytes == int(16 * GIB * 0.8) - int(8 * GIB * 0.8)
    assert (one.label, two.label) == ("this host's free memory", "the free memory of 2 hosts")


def test_ranks_on_one_host_share_its_memory_and_each_costs_a_copy(checkpoint: Path) -> None:
    shape = ModelConfig.read(checkpoint)
    one, two = (capacity.host_memory(8 * GIB, ranks, shape, "fp32").usable_bytes for ranks in (1, 2))
    assert one - two == capacity.HOST_OVERHEAD_BYTES + capacity.copied_bytes(shape, "fp32")


def test_a_host_without_room_is_offered_no_gpus(checkpoint: Path) -> None:
    with pytest.raises(DoesNotFit, match="this host's free memory") as refused:
        small_plan(checkpoint, slots=4, memory_mib=256, ranks=2)
    assert not any("×" in proposal for proposal in refused.value.nearest)


# ---- neighbours


def test_neighbours_of_two_a100_hold_the_users_and_lie_on_either_side() -> None:
    machine = Machine(GPUS["A100-80GB"], 2)
    cheaper, dearer = capacity.neighbours(wanted(context=32_768), machine, GPUS.values(), users=40)
    assert cheaper is not None
    assert dearer is not None
    assert cheaper.machine.bytes_per_s < machine.bytes_per_s < dearer.machine.bytes_per_s
    assert min(cheaper.plan.typical_chats, dearer.plan.typical_chats) >= 40
    assert (dearer.machine.count, dearer.machine.gpu.name, dearer.wanted.precision) == (1, "H200", "bf16")


def test_a_cheaper_neighbour_may_need_fewer_bits_and_never_gets_more() -> None:
    only_l4 = [GPUS["L4"]]
    cheaper, _ = capacity.neighbours(wanted(), Machine(GPUS["A6000"], 4), only_l4, users=1)
    assert cheaper is not None
    assert (cheaper.machine.count, cheaper.wanted.precision) == (8, "bf16")
    cheaper, _ = capacity.neighbours(wanted(), Machine(GPUS["RTX6000Ada"], 2), only_l4, users=1)
    assert cheaper is not None
    assert (cheaper.machine.count, cheaper.wanted.precision) == (4, "fp8")
    cheaper, _ = capacity.neighbours(wanted(precision="int4"), Machine(GPUS["A6000"], 4), only_l4, users=1)
    assert cheaper is not None
    assert cheaper.wanted.precision == "int4"


def test_there_is_no_neighbour_for_more_users_than_any_known_machine_holds() -> None:
    assert capacity.neighbours(wanted(), Machine(GPUS["H200"], 1), GPUS.values(), users=50_000) == (None, None)


# ---- explanations


def evaluate(text: str) -> float:
    plain = text.replace("×", "*").replace("−", "-").replace("^", "**")
    assert re.fullmatch(r"(floor|min|max|[\d.e+\-*/(), ])+", plain), text
    return float(eval(plain, {"__builtins__": {}}, {"floor": math.floor, "min": min, "max": max}))


@pytest.mark.parametrize(
    "flags",
    [
        [*A100S, "--users", "40", "--prompt_tokens", "3000"],
        ["--model", "8x22B", "--gpu", "H100", "--gpus", "4", "--precision", "fp8", "--kv_dtype", "fp8"],
        ["--gpu", "RTX6000Ada", "--precision", "int4", "--mean_tokens", "7000", "--speed_share", "0.7"],
        ["--gpu", "RTX6000Ada", "--gpus", "2", "--memory_share", "0.97", "--context", "4000"],
    ],
)
def test_the_sum_that_explains_a_number_gives_that_number(flags: list[str]) -> None:
    report = built(*flags)
    figures = [*report.figures, *(figure for batch in report.batches for figure in batch.figures)]
    for figure in figures:
        assert evaluate(figure.sum) == pytest.approx(figure.value, rel=1e-4), f"{figure.label}: {figure.sum}"


def test_every_number_of_the_json_is_explained() -> None:
    shown = report_of(*A100S)
    asked = {"gpus", "context", "users", "users_at_once", "prompt_tokens", "mean_tokens", "speed_share"}
    numbers = {key for key, value in shown.items() if isinstance(value, int | float) and not isinstance(value, bool)} - asked
    numbers |= {f"batches.{b['batch']}.{key}" for b in shown["batches"] if b["fits"] for key in b if key not in ("batch", "fits")}
    assert numbers == set(shown["explanations"])


# ---- the command


def test_table_shows_what_fits_how_fast_and_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity_cli.main([*A100S, "--users", "200", "--explain"]) == capacity_cli.FITS
    text = capsys.readouterr().out
    for words in (
        "8x7B in bf16 on 2 × A100-80GB",
        "56.3",
        "150 served at once, 50 wait",
        "1,339",
        "cheaper:",
        "dearer:",
        "Computed, not measured",
    ):
        assert words in text
    assert re.search(r"^ +200 +– ", text, re.M), "a batch that does not fit has no speed"
    assert "2,039 GB/s" in text, "--explain names the data sheet"


def test_users_beyond_the_slots_wait_although_memory_would_hold_them() -> None:
    shown = report_of("--gpu", "H200", "--precision", "int4", "--users", "260")
    assert (shown["typical_chats"], shown["max_batch_size"], shown["users_at_once"]) == (278, 256, 256)
    assert {batch["batch"]: batch["fits"] for batch in shown["batches"]} == {1: True, 8: True, 32: True, 128: True, 256: True, 260: False}


def test_json_is_one_object_with_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity_cli.main([*A100S, "--json"]) == capacity_cli.FITS
    shown = json.loads(capsys.readouterr().out)
    assert (shown["fits"], shown["measured"], shown["full_length_chats"]) == (True, False, 14)
    assert "explanations" not in shown


def test_what_does_not_fit_ends_with_1_and_says_so_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity_cli.main(["--gpu", "A100-80GB", "--json"]) == capacity_cli.FITS_NOT
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["fits"] is False
    assert shown["nearest"] == ["int8 (27.9 GiB left for chats)", "2 × A100-80GB (56.3 GiB left for chats)"]
    assert err.startswith("capacity: 8x7B in bf16 does not fit on 1 × A100-80GB")


def test_roofline_is_one_svg_with_a_point_per_batch_that_fits_and_no_outside_reference(tmp_path: Path) -> None:
    path = tmp_path / "roofline.svg"
    assert capacity_cli.main([*A100S, "--users", "400", "--json", "--svg", str(path)]) == capacity_cli.FITS
    text = path.read_text(encoding="utf-8")
    drawing = ElementTree.fromstring(text)
    best = [mark for mark in drawing.iter("{http://www.w3.org/2000/svg}circle") if mark.get("class") == "best"]
    assert len(best) == len((1, 8, 32, 128)) + 1, "and one of a prefill chunk; 400 chats do not fit"
    heights = [float(mark.get("cy", "")) for mark in best[:-1]]
    assert heights == sorted(heights, reverse=True), "larger batches reach more FLOP/s"
    assert "nothing is measured" in text
    assert not re.search(r"href|url\(|<script|<image", text)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "A6000", "--gpus", "3"], ["--gpus is 3", "8 KV heads", "1, 2, 4, 8"]),
        (["--gpu", "Voodoo2"], ["Voodoo2", "A100-80GB", "--gpu_table"]),
        (["--gpu", "A6000", "--precision", "fp8"], ["fp8", "8.9", "A6000", "int8"]),
        (["--gpu", "H200", "--context", "40000"], ["40,000", "32,768"]),
        (["--gpu", "H200", "--context", "1"], ["--context", "at least 2", "given 1"]),
        (["--gpu", "H200", "--users", "0"], ["--users", "from 1", "given 0"]),
        (["--gpu", "H200", "--memory_share", "1.1"], ["--memory_share", "at most 1", "given 1.1"]),
        (["--gpu", "H200", "--speed_share", "0"], ["--speed_share", "above 0", "given 0"]),
        (["--gpu", "H200", "--model", "9x9B"], ["9x9B", "8x7B", "8x22B", "folder"]),
        (["--gpu", "H200", "--precision", "int3"], ["--precision", "int3", "--help"]),
        (["--gpu", "H200", "--svg", "/no/such/folder/x.svg"], ["--svg", "/no/such/folder", "folder that exists"]),
        (["--gpu", "H200", "--gpu_table", "/no/such.toml"], ["/no/such.toml", "gpus.toml"]),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_sentence(flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity_cli.main(flags) == capacity_cli.WRONG_QUESTION
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert said.count("\n") == 1


def test_a_folder_is_planned_by_its_params_json_and_its_own_context(checkpoint: Path, tmp_path: Path) -> None:
    params = json.loads((checkpoint / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"max_seq_len": 512}))
    shown = report_of("--model", str(tmp_path), "--gpu", "L4", "--precision", "fp32", "--kv_dtype", "fp32")
    assert (shown["model"], shown["context"], shown["kv_kib_per_token"]) == (tmp_path.name, 512, 2 * 2 * 4 * 8 * 4 / 1024)


def test_a_hugging_face_folder_is_planned_by_its_config_json(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    config |= {"intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
    config |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = report_of("--model", str(tmp_path), "--gpu", "H200")
    assert (shown["model"], shown["context"], shown["kv_kib_per_token"]) == (tmp_path.name, 8192, 128)


# ---- GPUs


def test_every_card_of_the_table_names_its_source_and_no_name_means_two_cards() -> None:
    names = [re.sub(r"\W", "", name.lower()) for gpu in GPUS.values() for name in (gpu.name, *gpu.names)]
    assert len(names) == len(set(names))
    assert all("data sheet" in gpu.source or "whitepaper" in gpu.source for gpu in GPUS.values())


@pytest.mark.parametrize("asked", ["RTX6000Ada", "rtx 6000 ada", "NVIDIA RTX 6000 Ada Generation"])
def test_a_card_is_found_by_any_of_its_names(asked: str) -> None:
    assert capacity_cli.find_gpu(asked, GPUS) is GPUS["RTX6000Ada"]


def test_a_table_of_ones_own_adds_a_card(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[Mine]\nmemory_gib = 100\nbandwidth_tb_s = 2.0\nbf16_tflops = 400\nfp8 = true\nsource = "my bench"\n')
    shown = report_of("--gpu", "mine", "--gpu_table", str(mine), "--precision", "fp8")
    assert shown["usable_gib"] == pytest.approx(100 * 0.92 - 1.2, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[Mine]\nmemory_gib = 100\n", "bandwidth_tb_s"), ("Mine = 3\n", "Mine"), ("[", "GPU table")],
)
def test_a_table_of_another_form_is_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(text)
    with pytest.raises(SettingsRefused, match=words) as refused:
        capacity_cli.read_gpus(mine)
    assert str(mine) in str(refused.value)


def test_a_card_with_a_figure_of_zero_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[Mine]\nmemory_gib = 100\nbandwidth_tb_s = 0\nbf16_tflops = 400\nfp8 = true\nsource = "my bench"\n')
    with pytest.raises(SettingsRefused, match="above 0"):
        capacity_cli.read_gpus(mine)


def test_cards_that_the_driver_lists_are_counted() -> None:
    assert capacity_cli.identify("NVIDIA RTX A6000, 49140\nNVIDIA RTX A6000, 49140\n", GPUS) == (GPUS["A6000"], 2)


def test_a_card_with_less_memory_than_the_table_says_counts_as_it_is() -> None:
    gpu, _ = capacity_cli.identify("NVIDIA H200, 71680\n", GPUS)
    assert gpu.memory_gib == 70


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        ("NVIDIA RTX A6000, 49140\nNVIDIA H200, 143771\n", "NVIDIA H200, NVIDIA RTX A6000.*one kind"),
        ("", "found no GPU"),
        ("NVIDIA Future 1, 999999\n", "NVIDIA Future 1.*--gpu_table"),
    ],
)
def test_cards_that_cannot_share_a_model_or_are_unknown_are_refused(listing: str, words: str) -> None:
    with pytest.raises(SettingsRefused, match=words):
        capacity_cli.identify(listing, GPUS)


def test_auto_takes_as_many_of_the_cards_found_as_can_share_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nfor card in 1 2 3; do echo 'NVIDIA A100-SXM4-80GB, 81920'; done\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    shown = report_of("--gpu", "auto")
    assert (shown["gpu"], shown["gpus"]) == ("A100-80GB", 2)


def test_auto_without_a_driver_says_to_name_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsRefused, match="nvidia-smi, which is not on PATH; name a card with --gpu"):
        built()


# ---- no torch

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # importing it raises
sys.argv = ["worker", *sys.argv[1:]]
runpy.run_module("worker", run_name="__main__")
"""


@pytest.mark.parametrize(("flags", "words"), [(["--help"], "--kv_dtype"), ([*A100S, "--explain"], "8x7B in bf16 on 2 × A100-80GB")])
def test_the_subcommand_answers_where_torch_cannot_be_imported(flags: list[str], words: str) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "capacity", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert words in ended.stdout


def test_python_m_worker_capacity_ends_with_1_where_the_model_does_not_fit() -> None:
    command = [sys.executable, "-m", "worker", "capacity", "--gpu", "A6000"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "does not fit on 1 × A6000" in ended.stderr
