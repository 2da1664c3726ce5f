"""`python -m benchmark compare A.json B.json`: two results side by side, with ratios.

Decides which figures stand in the table, which direction is better, and what makes two runs unlike. Says so where it does: a ratio of
runs that asked different things is no answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mixtral_benchmark.report import FORMAT, ROWS, level_of, number, stdout_console

OK, NOT_COMPARED = 0, 2
COLUMNS = 140

HIGHER_IS_BETTER = {
    "output_throughput": "tokens/s in all",
    "steady_output_throughput": "tokens/s, steady",
    "request_throughput": "chats per second",
    "median_chat_tokens_per_s": "tokens/s per chat",
    "request_goodput": "good chats per second",
}
LOWER_IS_BETTER = {
    f"{statistic}_{name}_ms": f"{words.strip()}, {statistic if statistic != 'median' else 'p50'} ms"
    for name, words in ROWS.items()
    for statistic in ("median", "p99")
    if not name.startswith("scheduled_e2el")
}
COUNTS = {"completed": "chats completed", "failed": "chats failed", "total_output_tokens": "tokens generated"}

ASKED = (
    *("endpoint_name", "api", "total_requests", "concurrent_requests", "request_rate", "burstiness", "ramp_to", "trace", "trace_speed"),
    *("prompt", "prompt_file", "context_length", "input_tokens", "input_spread", "shared_prefix_tokens", "prefixes", "turns", "think_s"),
    *("max_tokens", "ignore_eos", "temperature", "seed"),
)
"""Flags that decide what was asked; where they differ, the ratios compare different things."""


class NotCompared(Exception):
    """The message is the sentence to show."""


def main(argv: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(
        prog="mixtral-benchmark compare",
        description="Two results side by side. The ratio is B over A; ▲ where B is better, ▼ where it is worse, and nothing where the\n"
        "95 % intervals of both overlap. The last line is one JSON object with the ratios.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reader.add_argument("before", type=Path, metavar="A.json", help="as --json_file wrote it; of a sweep too")
    reader.add_argument("after", type=Path, metavar="B.json")
    given = reader.parse_args(argv)
    out = stdout_console(COLUMNS)
    try:
        pairs = list(paired(read(given.before), read(given.after)))
    except NotCompared as refused:
        print(refused, file=sys.stderr)
        return NOT_COMPARED
    for label, before, after in pairs:
        show(out, label, before, after)
    ratios = [_ratios(*pair) for pair in pairs]
    print(json.dumps({"format": FORMAT, "before": str(given.before), "after": str(given.after), "runs": ratios}))
    return OK


def read(path: Path) -> dict[str, Any]:
    """Raises NotCompared for a file that is no result."""
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise NotCompared(f"{path} cannot be read as a result: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(outcome, dict) or outcome.get("format") != FORMAT:
        found = outcome.get("format") if isinstance(outcome, dict) else None
        raise NotCompared(f"{path} must be a result of this benchmark in format {FORMAT}, as --json_file writes it; its format is {found}")
    return outcome


def paired(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(label, run of A, run of B): runs of sweeps by their level. Raises NotCompared where no two belong together."""
    if ("runs" in before) != ("runs" in after):
        raise NotCompared("one of the two is a sweep and the other a single run; compare like with like")
    if "runs" not in before:
        yield "", before, after
        return
    levels = {level_of(run): run for run in after["runs"]}
    common = [(level, run, levels[level]) for run in before["runs"] if (level := level_of(run)) in levels]
    if not common:
        raise NotCompared("the two sweeps have no level in common")
    yield from common


def show(console: Console, label: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=label or None, title_justify="left")
    for heading in ("", "A", "B", "B/A", ""):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for key, words in {**COUNTS, **HIGHER_IS_BETTER, **LOWER_IS_BETTER}.items():
        a, b = before.get(key), after.get(key)
        if a is None and b is None:
            continue
        ratio = _ratio(a, b)
        table.add_row(words, _shown(a), _shown(b), "–" if ratio is None else f"{ratio:.3f}", _verdict(key, before, after))
    console.print(table, highlight=False)
    for difference in differences(before, after):
        console.print(f"not alike: {difference}", highlight=False, markup=False)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What the two runs did not have in common, in words; the commit and the server may differ, that is what one compares."""
    flags = [(name, before["flags"].get(name), after["flags"].get(name)) for name in ASKED]
    found = [f"--{name} was {a} in A and {b} in B" for name, a, b in flags if a != b]
    for name in ("system", "cpu_count"):
        a, b = before["platform"].get(name), after["platform"].get(name)
        if a != b:
            found.append(f"the client's {name} was {a} in A and {b} in B")
    tokens = [run["total_output_tokens"] / max(1, run["completed"]) for run in (before, after)]
    if min(tokens) and max(tokens) / min(tokens) > 1.1:
        found.append(f"answers had {tokens[0]:.0f} tokens on average in A and {tokens[1]:.0f} in B; --ignore_eos makes them equal")
    return found


def _ratios(label: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    keys = [*COUNTS, *HIGHER_IS_BETTER, *LOWER_IS_BETTER]
    ratios = {key: _ratio(before.get(key), after.get(key)) for key in keys}
    shown = {key: round(ratio, 4) for key, ratio in ratios.items() if ratio is not None}
    return {"label": label, "ratios": shown, "not_alike": differences(before, after)}


def _ratio(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def _verdict(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """▲ better, ▼ worse; nothing where one cannot tell."""
    a, b = before.get(key), after.get(key)
    if key in COUNTS or a is None or b is None or a == b:
        return ""
    of_a, of_b = before.get("ci95", {}).get(key), after.get("ci95", {}).get(key)
    if of_a and of_b and of_a[0] <= of_b[1] and of_b[0] <= of_a[1]:
        return ""
    return "▲" if (b > a) == (key in HIGHER_IS_BETTER) else "▼"


def _shown(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)
