"""The table says what the figures say, and what a figure is worth."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from mixtral_benchmark.measure import PERCENTILES, Arrival, Chat, Failure, figures, latencies_s
from mixtral_benchmark.report import ROWS, chat_rows, circumstances, git_commit, json_line, result, show

FACTS: dict[str, object] = {"format": 1, "flags": {"request_rate": None}}
OPEN_LOOP: dict[str, object] = {"format": 1, "flags": {"request_rate": 2.0}}


def three_fates() -> list[Chat]:
    completed = Chat(0, 0.0, 0.0, [Arrival(1.0, 1), Arrival(2.0, 3)], ended_s=3.0, finish="stop")
    failed = Chat(1, 0.0, 0.5, ended_s=1.0, failure=Failure("queue_full", "the queue is full"))
    return [completed, failed, Chat(2, 0.0, 1.0)]


def shown(chats: list[Chat], cpu_share: float = 0.1, facts: dict[str, object] = FACTS) -> str:
    text = io.StringIO()
    show(Console(file=text, width=120), chats, result(chats, figures(chats, 0.0, 4.0), facts, cpu_share))
    return text.getvalue()


def test_every_latency_has_a_row_with_words() -> None:
    assert list(ROWS) == list(latencies_s([]))


def test_table_names_each_failure_with_its_count_and_first_sentence() -> None:
    text = shown([*three_fates(), Chat(3, 0.0, 0.5, ended_s=1.0, failure=Failure("queue_full", "later"))])
    assert ["queue_full", "2", "the queue is full"] in [
        [part.strip() for part in line.split("  ") if part.strip()] for line in text.splitlines()
    ]
    assert "2 failed, 1 interrupted" in text


def test_what_a_server_says_is_shown_as_it_is() -> None:
    assert "[bold]no[/]" in shown([Chat(0, 0.0, 0.0, ended_s=1.0, failure=Failure("refused", "[bold]no[/]"))])


def test_table_leaves_out_what_was_not_measured() -> None:
    text = shown(three_fates())
    assert "time to first token" in text
    assert "queue (server)" not in text
    assert "None" not in text


def test_latencies_from_the_plan_are_shown_for_an_open_loop_where_they_may_differ() -> None:
    assert "from the planned send" in shown(three_fates(), facts=OPEN_LOOP)
    assert "from the planned send" not in shown(three_fates())


def test_run_that_measured_nothing_still_has_a_table() -> None:
    text = shown([])
    assert "chats completed" in text
    assert "milliseconds" not in text


def test_table_says_how_many_tokens_shared_a_frame() -> None:
    assert "50.0% held several tokens (at most 3)" in shown(three_fates())


def test_benchmark_that_was_itself_the_limit_says_so() -> None:
    assert "may itself be the limit" in shown(three_fates(), cpu_share=0.9)
    assert "may itself be the limit" not in shown(three_fates(), cpu_share=0.5)


def test_json_line_is_one_line_with_the_names_of_vllms_tool() -> None:
    line = json_line(result(three_fates(), figures(three_fates(), 0.0, 4.0), FACTS, 0.1))
    assert "\n" not in line
    names = {"completed", "failed", "duration", "total_input_tokens", "total_output_tokens"}
    names |= {"request_throughput", "output_throughput", "total_token_throughput", "max_concurrent_requests"}
    statistics = ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES))
    names |= {f"{statistic}_{name}_ms" for statistic in statistics for name in ("ttft", "tpot", "itl", "e2el")}
    assert names <= set(json.loads(line))


def test_chat_rows_hold_every_fate() -> None:
    rows = chat_rows(three_fates(), started_s=-1.0)
    assert [(row["sent_ms"], row["ttft_ms"], row["e2el_ms"], row["tokens"]) for row in rows] == [
        (1000.0, 1000.0, 3000.0, 4),
        (1500.0, None, 500.0, 0),
        (2000.0, None, None, 0),
    ]
    assert [row["failure"] and row["failure"]["code"] for row in rows] == [None, "queue_full", None]


def test_commit_is_none_outside_a_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None


def test_document_defines_every_key_of_the_result() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/benchmarking.md").read_text()
    outcome = result([], figures([], 0.0, 1.0), circumstances({"endpoint_name": "m"}, None), 0.0)
    keys = {name for name in outcome if not name.endswith("_ms")} | set(latencies_s([]))
    assert len(keys) > 40
    assert {key for key in keys if f"`{key}`" not in text} == set()
