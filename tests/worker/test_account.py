"""What a worker says of its steps: where their time went, what they carried, how even the experts were used."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mixtral_worker import bandwidth, capacity
from mixtral_worker.account import Account, Window, imbalance
from mixtral_worker.engine import Engine
from mixtral_worker.model.config import MIXTRAL_8X7B, ModelConfig
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from mixtral_worker.telemetry import PARTS, RATE_WINDOW_S, Telemetry, summary


def plan(*ends: int) -> StepPlan:
    rows = tuple(Row(i, end - 1, (5,), tuple(range(-(-end // 16))), True, 1, Sampling(0)) for i, end in enumerate(ends))
    return StepPlan(Kind.STEP, 1, rows)


@pytest.mark.parametrize(("batch", "gigabytes"), [(1, 25.5), (2, 42.4), (4, 64.6), (8, 84.1), (16, 92.2), (32, 93.1)])
def test_bytes_of_a_step_of_8x7b_are_those_of_the_formula(batch: int, gigabytes: float) -> None:
    """In bf16, at contexts of one token, which add next to nothing."""
    account = Account(MIXTRAL_8X7B, "bf16")
    account.add(plan(*[1] * batch), 0.0, 0.0)
    assert account.bytes / 1e9 == pytest.approx(gigabytes, abs=0.1)


def test_contexts_add_their_keys_and_values() -> None:
    short, long = Account(MIXTRAL_8X7B, "bf16"), Account(MIXTRAL_8X7B, "bf16")
    short.add(plan(1, 1), 0.0, 0.0)
    long.add(plan(1001, 1), 0.0, 0.0)
    assert long.bytes - short.bytes == 1000 * 128 * 1024


def test_share_of_the_bandwidth_is_that_of_the_last_ten_seconds() -> None:
    now_s = 0.0
    account = Account(MIXTRAL_8X7B, "bf16", bytes_per_s=1e12, clock=lambda: now_s)
    read = capacity.weights_read_bytes(MIXTRAL_8X7B, "bf16", 1) + 128 * 1024
    for took_s in [0.05] * 100 + [0.1] * 200:
        account.figures(0.0, None)
        account.add(plan(1), 0.001, took_s)
        now_s += took_s
    assert account.figures(0.0, None)["bandwidth_share"] == pytest.approx(read / 0.1 / 1e12, rel=0.1)
    assert account.figures(0.0, None)["steps_total"] == 300


def test_an_unknown_bandwidth_gives_no_share() -> None:
    account = Account(MIXTRAL_8X7B, "bf16")
    account.add(plan(1), 0.0, 1.0)
    assert account.figures(0.0, None)["bandwidth_share"] == 0


def test_imbalance_is_averaged_over_layers_because_pooled_counts_hide_it() -> None:
    assert imbalance(np.array([[4, 0], [0, 4]])) == 2.0
    assert imbalance(np.array([[3, 1], [2, 2]])) == 1.25
    assert imbalance(np.array([[3, 1], [0, 0]])) == 1.5
    assert imbalance(np.zeros((2, 8))) == 0.0


def test_window_forgets_what_is_older_than_it() -> None:
    window = Window()
    grown = [float(window.grown(float(i), np.array([i * i]))[0]) for i in range(40)]
    assert grown[5] == 25
    assert grown[39] == 39**2 - (39 - int(RATE_WINDOW_S)) ** 2


def test_the_engine_counts_every_choice_of_its_routers_whichever_way_it_computes(checkpoint: Path) -> None:
    config = ModelConfig.read(checkpoint)
    counts = []
    for fast in (True, False):
        engine = Engine.load(checkpoint, max_slots=3, max_seq_len=64)
        engine.fast = engine.fast if fast else None
        row = Row(0, 0, tuple(range(20)), (0, 1), True, 1, Sampling(0))
        engine.step(StepPlan(Kind.STEP, 1, (row,)))
        engine.step(plan(21, 1))
        chosen = engine.expert_tokens()
        assert chosen is not None
        assert chosen.sum(1).tolist() == [22 * config.experts_per_token] * config.n_layers
        assert engine.sample_s > 0
        counts.append(chosen)
    assert counts[0].tolist() == counts[1].tolist()


def test_a_dense_model_has_no_experts_to_count(checkpoints: dict[str, Path]) -> None:
    engine = Engine.load(checkpoints["dense"], max_slots=1, max_seq_len=32)
    engine.step(plan(1))
    assert engine.expert_tokens() is None


def test_a_processors_bandwidth_is_measured_and_counts_each_host() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < bandwidth.bytes_per_s(cpu, ranks=2, hosts=1) < 1e13
    assert bandwidth.bytes_per_s(cpu, ranks=8, hosts=1000) > 1e11


def test_summary_is_the_mean_step_since_the_line_before() -> None:
    before = Telemetry(steps_total=10, step_rows_total=20, forward_s_total=1.0, step_bytes_total=0.0)
    now = Telemetry(
        steps_total=30, step_rows_total=100, forward_s_total=1.5, step_bytes_total=4e7, running=4, kv_blocks_used=3, kv_blocks=9
    )
    shown = summary(before, now)
    assert (shown["batch"], shown["forward_ms"], shown["step_mb"], shown["kv_used"]) == (4.0, 25.0, 2.0, "3/9")
    assert {f"{part}_ms" for part in PARTS} <= set(shown)
    assert summary(now, now)["forward_ms"] == 0
