"""The result as one self-contained page: tables and SVG plots, nothing loaded from anywhere.

Decides which plots a run or a sweep has and how they are drawn. Every figure is measure.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mixtral_benchmark.measure import Chat, frame_gaps_s, levels, streaming_span, ttft_s
from mixtral_benchmark.report import level_of
from mixtral_benchmark.run import Measured

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 64, 20, 44, 52
COLOURS = ("#1f6feb", "#d1570b", "#1a7f37", "#8250df", "#bf3989", "#57606a")
MOST_POINTS = 400
"""Of a curve: more cannot be seen."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #8c959f; --line: #d0d7de; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --faint: #8b949e; --line: #30363d; --paper: #0d1117; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { margin: 2rem auto; max-width: 84rem; padding: 0 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; }
text { font: 12px system-ui, sans-serif; fill: var(--ink); } .title { font-weight: 600; font-size: 14px; } .faint { fill: var(--faint); }
.grid { stroke: var(--line); } .curve { fill: none; stroke-width: 2; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } th { color: var(--faint); font-weight: 500; }
"""


@dataclass(frozen=True)
class Series:
    """One curve. names, where given, are shown beside its points."""

    label: str
    points: Sequence[tuple[float, float]]
    names: Sequence[str] = ()


def page(outcome: Mapping[str, Any], runs: Sequence[Measured]) -> str:
    """HTML of a run's or a sweep's result. outcome is what the JSON line says."""
    outcomes = outcome.get("runs", [outcome])
    first = outcomes[0]
    plots = [*(_sweep_plots(outcomes) if len(outcomes) > 1 else ()), *_run_plots(runs)]
    title = f"{first['model_id']} at {first['flags']['api_server']}, {first['date']}"
    saturated = f"<p>The sweep ended there: {escape(str(outcome['saturated']))}.</p>" if outcome.get("saturated") else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{_figures(outcomes)}{saturated}"
        f"<main>{''.join(f'<figure>{plot}</figure>' for plot in plots)}</main>{_facts(first)}</body></html>\n"
    )


def _sweep_plots(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    by_rate = outcomes[0]["flags"]["sweep_rate"] is not None
    level = "request_rate" if by_rate else "concurrent_requests"
    words = "chats sent a second" if by_rate else "chats at once"
    throughput = "output_throughput" if by_rate else "steady_output_throughput"

    def over(key: str) -> list[tuple[float, float]]:
        return [(run["flags"][level], run[key]) for run in outcomes if run[key] is not None]

    pareto = [run for run in outcomes if run[throughput] is not None and run["median_chat_tokens_per_s"] is not None]
    trade = Series(
        "one point a run",
        [(run["median_chat_tokens_per_s"], run[throughput]) for run in pareto],
        [f"{run['flags'][level]:g}" for run in pareto],
    )
    ttft = [Series(f"p{p}", over(f"{name}_scheduled_ttft_ms")) for p, name in ((50, "median"), (99, "p99"))]
    plots = [
        chart("tokens a second in all", words, "tokens/s", [Series("all chats", over(throughput))], log_x=True),
        chart("one user's speed against all users'", "tokens/s of one chat (median)", "tokens/s in all", [trade]),
        chart("time to first token", words, "ms", ttft, log_x=True, log_y=True),
    ]
    if outcomes[0]["request_goodput"] is not None:
        goals = " ".join(outcomes[0]["flags"]["slo"])
        plots.append(chart(f"chats that kept {goals}", words, "a second", [Series("good", over("request_goodput"))], log_x=True))
    return plots


def _run_plots(runs: Sequence[Measured]) -> list[str]:
    shown = runs[-len(COLOURS) :]

    def curves(of: Mapping[str, Sequence[float]]) -> list[Series]:
        return [Series(label, cumulative(values)) for label, values in of.items() if values]

    def label(run: Measured) -> str:
        return "this run" if len(runs) == 1 else f"{run.flags.request_rate or run.flags.concurrent_requests:g}"

    completed = {label(run): [chat for chat in run.load.chats if chat.completed] for run in shown}
    first_tokens = {name: [value * 1000 for chat in chats if (value := ttft_s(chat)) is not None] for name, chats in completed.items()}
    gaps = {name: [gap * 1000 for chat in chats for gap in frame_gaps_s(chat.arrivals)] for name, chats in completed.items()}
    last = shown[-1]
    return [
        chart("time to first token, share of chats below", "ms", "share", curves(first_tokens), log_x=True),
        chart("gap between frames, share below", "ms", "share", curves(gaps), log_x=True),
        chart("timeline: tokens in each second", "s", "tokens/s", [Series(label(last), tokens_each_second(last))]),
        chart("timeline: chats streaming", "s", "chats", [Series(label(last), streaming(last.load.chats, last.load.started_s))]),
    ]


def cumulative(values: Iterable[float]) -> list[tuple[float, float]]:
    """(value, share of values up to it), rising."""
    ordered = sorted(value for value in values if value > 0)
    steps = [(value, (i + 1) / len(ordered)) for i, value in enumerate(ordered)]
    return thinned(steps)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    return [*points[:-1:stride], *points[-1:]]


def tokens_each_second(run: Measured) -> list[tuple[float, float]]:
    seconds: dict[int, int] = {}
    for chat in run.load.chats:
        for arrival in chat.arrivals:
            second = int(arrival.at_s - run.load.started_s)
            seconds[second] = seconds.get(second, 0) + arrival.tokens
    return [(second, seconds.get(second, 0)) for second in range(max(seconds, default=-1) + 1)]


def streaming(chats: Iterable[Chat], started_s: float) -> list[tuple[float, float]]:
    """How many chats had begun and not ended, drawn as steps."""
    steps: list[tuple[float, float]] = []
    for at_s, level in levels(span for chat in chats if (span := streaming_span(chat))):
        steps += [(at_s - started_s, steps[-1][1] if steps else 0), (at_s - started_s, level)]
    return thinned(steps)


# ---------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Axis:
    """Values to pixels, straight or logarithmic."""

    low: float
    high: float
    is_log: bool
    from_px: float
    to_px: float

    @classmethod
    def over(cls, values: Sequence[float], is_log: bool, from_px: float, to_px: float) -> Axis:
        if is_log:
            positive = [value for value in values if value > 0] or [1.0]
            return cls(
                10 ** math.floor(math.log10(min(positive))), 10 ** math.ceil(math.log10(max(positive) * 1.001)), True, from_px, to_px
            )
        return cls(0.0, _round_up(max(values, default=1.0)), False, from_px, to_px)

    def place(self, value: float) -> float:
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.from_px + share * (self.to_px - self.from_px)

    @property
    def ticks(self) -> list[float]:
        if self.is_log:
            powers = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(powers) <= 3 else (1,)
            return [step * 10.0**power for power in powers for step in steps if step * 10.0**power <= self.high * 1.001]
        return [self.high * i / 4 for i in range(5)]


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value)


def chart(title: str, x_words: str, y_words: str, series: Sequence[Series], *, log_x: bool = False, log_y: bool = False) -> str:
    """An SVG of curves over common axes; says so where there is nothing to draw."""
    points = [point for one in series for point in one.points]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
    named = f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>'
    if not points:
        return f'{head}{named}<text class="faint" x="{LEFT}" y="{HEIGHT / 2}">nothing was measured</text></svg>'
    x = Axis.over([point[0] for point in points], log_x, LEFT, WIDTH - RIGHT)
    y = Axis.over([point[1] for point in points], log_y, HEIGHT - BOTTOM, TOP)
    body = [*_grid(x, y, x_words, y_words)]
    for i, one in enumerate(series):
        body += _curve(one, x, y, COLOURS[i % len(COLOURS)])
    if len(series) > 1:
        body += _legend(series)
    return f"{head}{named}{''.join(body)}</svg>"


def _grid(x: Axis, y: Axis, x_words: str, y_words: str) -> list[str]:
    drawn = []
    for tick in x.ticks:
        at = x.place(tick)
        drawn.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        drawn.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks:
        at = y.place(tick)
        drawn.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    drawn.append(f'<text class="faint" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_words)}</text>')
    drawn.append(f'<text class="faint" x="{LEFT}" y="{TOP - 9}">{escape(y_words)}</text>')
    return drawn


def _curve(one: Series, x: Axis, y: Axis, colour: str) -> list[str]:
    placed = [(x.place(a), y.place(b)) for a, b in one.points]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
    drawn = [f'<polyline class="curve" stroke="{colour}" points="{line}"/>']
    if len(placed) <= 40:
        for (a, b), (value, height) in zip(placed, one.points, strict=True):
            shown = f"{escape(one.label)}: {value:g}, {height:,.4g}"
            drawn.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"><title>{shown}</title></circle>')
    for (a, b), name in zip(placed, one.names, strict=False):
        drawn.append(f'<text x="{a + 6:.1f}" y="{b - 6:.1f}">{escape(name)}</text>')
    return drawn


def _legend(series: Sequence[Series]) -> list[str]:
    drawn = []
    for i, one in enumerate(series):
        at = WIDTH - RIGHT - 70 * (len(series) - i)
        colour = COLOURS[i % len(COLOURS)]
        drawn.append(f'<rect x="{at}" y="{TOP - 17}" width="10" height="10" fill="{colour}"/>')
        drawn.append(f'<text x="{at + 14}" y="{TOP - 8}">{escape(one.label)}</text>')
    return drawn


# ---------------------------------------------------------------------------------------------- tables


COLUMNS = {
    "completed": "completed",
    "failed": "failed",
    "output_throughput": "tokens/s",
    "steady_output_throughput": "steady tokens/s",
    "median_chat_tokens_per_s": "per chat",
    "median_ttft_ms": "TTFT p50 ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "median_tpot_ms": "TPOT p50 ms",
    "p99_frame_gap_ms": "gap p99 ms",
    "good_share": "good",
}


def _figures(outcomes: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in COLUMNS if any(run.get(key) is not None for run in outcomes)]
    head = "".join(f'<th class="n">{escape(COLUMNS[key])}</th>' for key in keys)
    rows = []
    for run in outcomes:
        cells = "".join(f'<td class="n">{_shown(run.get(key))}</td>' for key in keys)
        rows.append(f"<tr><th>{escape(level_of(run))}</th>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _facts(outcome: Mapping[str, Any]) -> str:
    """The circumstances, without which no figure means anything."""
    facts = {name: outcome[name] for name in ("date", "git_commit", "benchmark_version", "server", "platform")}
    set_flags = {name: value for name, value in outcome["flags"].items() if value not in (None, False, [], ())}
    rows = {**facts, "flags": set_flags, "client_cpu_share": outcome["client_cpu_share"], "failures": outcome["failures"]}
    told = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_told(value))}</td></tr>" for name, value in rows.items())
    return f"<h2>circumstances</h2><table>{told}</table>"


def _told(value: object) -> str:
    return ", ".join(f"{name} {_told(part)}" for name, part in value.items()) if isinstance(value, Mapping) else str(value)
