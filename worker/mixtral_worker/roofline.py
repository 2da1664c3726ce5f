"""The roofline of a capacity plan as an SVG: what bandwidth and FLOP/s allow, and where decode steps and a prefill chunk stand below.

Decides only the drawing; every figure is capacity_report.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mixtral_worker import capacity
from mixtral_worker.capacity import Pass
from mixtral_worker.capacity_report import PREFILL_SHARE, Report

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 70, 24, 64, 60


@dataclass(frozen=True)
class Axes:
    """Both axes logarithmic, from and to powers of ten."""

    x: tuple[int, int]
    y: tuple[int, int]

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def svg(report: Report) -> str:
    """FLOPs per byte read against FLOP/s: the machine's roof, each batch on it, and what is expected below."""
    machine, wanted = report.setup.machine, report.setup.wanted
    peak, ridge = machine.flops_per_s / 1e12, machine.flops_per_s / machine.bytes_per_s
    chunk = capacity.prefill_chunks(wanted, machine, capacity.PREFILL_CHUNK)[0]
    points = [(f"B = {b.size}: {b['total_ceiling'].text} tok/s", b.step, report.share) for b in report.batches if b.fits]
    points.append((f"prefill of {chunk.tokens}: {chunk.tokens_per_s:,.0f} tok/s", chunk, PREFILL_SHARE))
    axes = _axes([step for _, step, _ in points], ridge, peak)
    left, right = 10.0 ** axes.x[0], 10.0 ** axes.x[1]
    roof = [axes.place(left, left * peak / ridge), axes.place(ridge, peak), axes.place(right, peak)]
    title = f"{wanted.name} in {wanted.precision} on {report.memory.label}: {peak:,.0f} TFLOP/s, {machine.bytes_per_s / 1e12:.2f} TB/s"
    body = [
        f'<text x="{LEFT}" y="26" class="title">{escape(title)}</text>',
        f'<text x="{LEFT}" y="46">{escape("computed ceilings (filled) and expected shares of them (hollow); nothing is measured")}</text>',
        *_grid(axes),
        f'<polyline class="roof" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in roof)}"/>',
    ]
    for i, (label, step, share) in enumerate(points):
        body += _point(axes, label, step, share, above=i % 2 == 1 and step is not chunk)  # in turns, so that neighbours' labels stay apart
    style = "text{font:12px sans-serif;fill:#222}.title{font-size:15px;font-weight:bold}"
    lines = ".grid{stroke:#ddd}.roof{fill:none;stroke:#b33;stroke-width:2}"
    marks = ".best{fill:#246}.expected{fill:none;stroke:#246}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f'<style>{style}{lines}{marks}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def _axes(steps: Sequence[Pass], ridge: float, peak: float) -> Axes:
    lowest = min(step.intensity for step in steps)
    speeds = [step.flops / step.seconds / 1e12 for step in steps]
    return Axes(
        (math.floor(math.log10(lowest)), math.ceil(math.log10(max(ridge, *(step.intensity for step in steps)) * 1.5))),
        (math.floor(math.log10(min(speeds) * PREFILL_SHARE)), math.ceil(math.log10(peak))),
    )


def _grid(axes: Axes) -> list[str]:
    lines = []
    for power in range(axes.x[0], axes.x[1] + 1):
        x, y = axes.place(10.0**power, 10.0 ** axes.y[0])
        lines.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(axes.y[0], axes.y[1] + 1):
        x, y = axes.place(10.0 ** axes.x[0], 10.0**power)
        lines.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    lines.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 16}" text-anchor="middle">FLOPs per byte read from memory</text>')
    lines.append(f'<text x="18" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 18 {HEIGHT / 2})">TFLOP/s</text>')
    return lines


def _point(axes: Axes, label: str, step: Pass, share: float, *, above: bool) -> list[str]:
    speed = step.flops / step.seconds / 1e12
    x, y = axes.place(step.intensity, speed)
    _, lower = axes.place(step.intensity, speed * share)
    side, anchor = (-8, "end") if above or x > WIDTH * 0.75 else (8, "start")
    return [
        f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        f'<circle class="expected" cx="{x:.1f}" cy="{lower:.1f}" r="4"/>',
        f'<text x="{x + side:.1f}" y="{y + (-6 if above else 14):.1f}" text-anchor="{anchor}">{escape(label)}</text>',
    ]
