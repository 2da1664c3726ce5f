"""When an open loop sends: every moment of a run, worked out before it begins.

Pure. Decides how sends are spread over time at a rate: evenly, at random (Poisson), in bursts (gamma), at a rate that rises or
falls. Leaves keeping to the moments to load.py.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import accumulate

CONSTANT = math.inf
"""The burstiness of even gaps."""


@dataclass(frozen=True)
class Pace:
    """So many sends a second, on average.

    burstiness is the shape of the gamma distribution that gaps are drawn from, as in `vllm bench serve`: 1 is a Poisson process,
    as of independent users; below 1 sends come in bursts; above 1 more evenly; CONSTANT exactly so. The squared coefficient of
    variation of the gaps is 1 / burstiness. With ramp_to_per_s the rate goes in a straight line from the one to the other.
    """

    rate_per_s: float
    burstiness: float = 1.0
    ramp_to_per_s: float | None = None


def moments_s(count: int, pace: Pace, seed: int) -> list[float]:
    """Seconds from the start of the run at which each of count chats is to be sent, the first at 0. A seed gives the same again."""
    draw = random.Random(seed)
    sends = accumulate((_gap(draw, pace.burstiness) for _ in range(count - 1)), initial=0.0)
    return [_when(pace, sent, count) for sent in sends]


def _gap(draw: random.Random, burstiness: float) -> float:
    """One gap of mean 1."""
    return 1.0 if burstiness == CONSTANT else draw.gammavariate(burstiness, 1 / burstiness)


def _when(pace: Pace, sent: float, count: int) -> float:
    """The moment by which `sent` chats are due: the inverse of the rate summed up over time."""
    first, last = pace.rate_per_s, pace.rate_per_s if pace.ramp_to_per_s is None else pace.ramp_to_per_s
    if first == last:
        return sent / first
    ramp_s = 2 * count / (first + last)
    ramped = min(sent, count)  # a draw may be longer than planned: what is beyond goes on at the last rate
    slope = (last - first) / ramp_s
    at_s = 2 * ramped / (first + math.sqrt(max(0.0, first**2 + 2 * slope * ramped)))
    return at_s + (sent - ramped) / last
