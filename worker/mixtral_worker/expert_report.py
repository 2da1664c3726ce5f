"""Which experts the routers chose: load, entropy, imbalance, pairs chosen together, and how many experts a step of B chats meets.

Decides what is counted and drawn. Counts each scored token once, where perplexity.py scores it. Watches by hooks that are there only while
a report is made: a worker that serves has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table
from torch import Tensor

from mixtral_worker.engine import Engine
from mixtral_worker.model.moe import MoE
from mixtral_worker.perplexity import Step

# L layers, T scored tokens, k experts per token, E experts.

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
DRAWS = 500  # steps drawn for each batch size


@dataclass(frozen=True)
class Distinct:
    """Experts that a decode step of so many chats meets in a layer, in the mean over draws and layers."""

    batch_size: int
    measured: float
    even: float  # were each token's experts drawn evenly, apart from all others: E · (1 − (1 − k/E)^B)


@dataclass(frozen=True)
class Experts:
    tokens: int
    experts_per_token: int
    load: list[list[float]]  # [L][E] shares of a layer's choices; a layer sums to 1
    entropy_bits: list[float]  # [L] of those shares; at most log2 E
    imbalance: list[float]  # [L] busiest expert over the mean
    mean_imbalance: float
    together: list[list[list[float]]]  # [L][E][E] share of the tokens that choose both; 0 where both are one
    distinct: list[Distinct]

    @property
    def count(self) -> int:
        return len(self.load[0])


class Recorder:
    """Keeps what the routers chose for scored tokens."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._n_experts = n_experts
        self._step: list[Tensor | None] = [None] * n_layers
        self._kept: list[npt.NDArray[np.uint8]] = []  # each [L, tokens of a step, k]
        self._windows: list[int] = []

    def saw(self, layer: int, experts: Tensor) -> None:  # [T of the step, k]
        self._step[layer] = experts

    def keep(self, step: Step) -> None:
        """Of the step just computed, the tokens whose next one is scored."""
        places: list[int] = []
        first = 0
        for row, count, window in zip(step.rows, step.last, step.windows, strict=True):
            first += len(row.tokens)
            places += range(first - count, first)
            self._windows += [window] * count
        chosen = torch.stack([experts for experts in self._step if experts is not None])
        self._kept.append(chosen[:, places].to("cpu", torch.uint8).numpy())

    def report(self, seed: int) -> Experts:
        return summarise(np.concatenate(self._kept, axis=1), np.array(self._windows), self._n_experts, seed)


@contextmanager
def recording(engine: Engine) -> Iterator[Recorder]:
    """Watch every router of the model until the block ends. Hooks see the modules only: no rank's engine may compute around them."""
    layers = [module for module in engine.model.modules() if isinstance(module, MoE)]
    engine.fast = None
    recorder = Recorder(len(layers), len(layers[0].gate))

    def watch(layer: int) -> Any:
        def before(moe: MoE, given: tuple[Tensor]) -> None:
            recorder.saw(layer, moe.choose(given[0])[1])  # chosen a second time: of the same x it is the same choice

        return before

    handles = [module.register_forward_pre_hook(watch(layer)) for layer, module in enumerate(layers)]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def summarise(chosen: npt.NDArray[np.uint8], windows: npt.NDArray[Any], n_experts: int, seed: int) -> Experts:
    """chosen [L, T, k] experts of each token, windows [T] that the tokens come from."""
    _, tokens, per_token = chosen.shape
    met = np.stack([_met(layer, n_experts) for layer in chosen])  # [L, T, E]
    load = met.sum(1) / (tokens * per_token)
    counts = (layer.astype(np.float64) for layer in met)
    together = np.stack([count.T @ count for count in counts]) / tokens
    together[:, range(n_experts), range(n_experts)] = 0
    logs = np.log2(load, out=np.zeros_like(load), where=load > 0)
    imbalance = load.max(1) * n_experts
    return Experts(
        tokens=tokens,
        experts_per_token=per_token,
        load=load.tolist(),
        entropy_bits=(-(load * logs).sum(1)).tolist(),
        imbalance=imbalance.tolist(),
        mean_imbalance=float(imbalance.mean()),
        together=together.tolist(),
        distinct=_distinct(met, windows, per_token, seed),
    )


def _met(chosen: npt.NDArray[np.uint8], n_experts: int) -> npt.NDArray[np.bool_]:
    met = np.zeros((len(chosen), n_experts), np.bool_)
    met[np.arange(len(chosen))[:, None], chosen] = True
    return met


def _distinct(met: npt.NDArray[np.bool_], windows: npt.NDArray[Any], per_token: int, seed: int) -> list[Distinct]:
    """A step is drawn as one token each of B texts; texts repeat only where there are fewer than B."""
    draw, n_experts = np.random.default_rng(seed), met.shape[2]
    starts = np.flatnonzero(np.diff(windows, prepend=-1))  # a window's tokens lie side by side
    spans = list(pairwise([*starts.tolist(), len(windows)]))
    found = []
    for size in BATCH_SIZES:
        steps = np.empty((DRAWS, size), np.int64)
        for i in range(DRAWS):
            texts = draw.choice(len(spans), size, replace=len(spans) < size)
            steps[i] = [draw.integers(*spans[text]) for text in texts]
        measured = met[:, steps].any(2).sum(-1).mean()  # [L, DRAWS, B, E] → experts per layer and step
        found.append(Distinct(size, float(measured), n_experts * (1 - (1 - per_token / n_experts) ** size)))
    return found


# ---- what is shown


def tables(experts: Experts) -> list[Table]:
    by_layer = Table(
        "layer",
        *(f"e{expert}" for expert in range(experts.count)),
        "entropy, bits",
        "busiest / mean",
        "pair above its loads",
        title=f"share of a layer's choices in %, {experts.tokens:,} tokens, {experts.experts_per_token} of {experts.count} experts each",
    )
    for layer, load in enumerate(experts.load):
        one, other, times = _closest_pair(experts, layer)
        by_layer.add_row(
            str(layer),
            *(f"{100 * share:.1f}" for share in load),
            f"{experts.entropy_bits[layer]:.3f}",
            f"{experts.imbalance[layer]:.2f}",
            f"e{one} and e{other}: {times:.2f}×",
        )
    by_layer.caption = f"busiest over mean, averaged over layers: {experts.mean_imbalance:.3f}"
    steps = Table(
        "chats in a step", "experts met per layer", "if drawn evenly", "measured / even", title="distinct experts of a decode step"
    )
    for row in experts.distinct:
        steps.add_row(str(row.batch_size), f"{row.measured:.2f}", f"{row.even:.2f}", f"{row.measured / row.even:.3f}")
    for table in (by_layer, steps):
        for column in table.columns:
            column.justify = "right"
    return [by_layer, steps]


def _closest_pair(experts: Experts, layer: int) -> tuple[int, int, float]:
    """The two experts that are chosen together most above what their loads alone would bring."""
    pairs = list(combinations(range(experts.count), 2))
    load, together = np.array(experts.load[layer]), np.array(experts.together[layer])
    expected = np.array([load[a] * load[b] for a, b in pairs])
    shares = np.array([together[a, b] for a, b in pairs])
    if not shares.any():  # one expert per token, or all tokens alike
        return *pairs[0], 0.0
    expected *= shares.sum() / expected.sum()
    times = np.divide(shares, expected, out=np.zeros_like(shares), where=expected > 0)
    best = int(times.argmax())
    return *pairs[best], float(times[best])


CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 46, 26, 64, 76
PAIR_CELL, MAPS_PER_ROW = 9, 6


def svg(experts: Experts, title: str) -> str:
    """Loads as a heat map of layers and experts; below it, layer by layer, which experts are chosen together; then a step's experts."""
    n_layers, count = len(experts.load), experts.count
    maps_top = TOP + n_layers * CELL_HEIGHT + 56
    map_size = PAIR_CELL * count + 34
    text_top = maps_top + -(-n_layers // MAPS_PER_ROW) * map_size + 24
    width = max(LEFT + count * CELL_WIDTH + 220, LEFT + min(n_layers, MAPS_PER_ROW) * map_size + 40, 720)
    height = text_top + 22 * (len(experts.distinct) + 1) + 16
    body = [
        _text(LEFT, 26, title, "title"),
        _text(LEFT, 46, f"share of each layer's choices in %, {experts.tokens:,} tokens; white 0, darkest twice the mean or more"),
        *(_text(LEFT + (e + 0.5) * CELL_WIDTH, TOP - 8, f"e{e}", "middle") for e in range(count)),
        _text(LEFT + count * CELL_WIDTH + 12, TOP - 8, "busiest / mean · entropy, bits"),
    ]
    for layer, load in enumerate(experts.load):
        y = TOP + layer * CELL_HEIGHT
        body.append(_text(LEFT - 10, y + 18, f"layer {layer}", "end"))
        for e, share in enumerate(load):
            strength = share * count / 2
            body.append(_cell(LEFT + e * CELL_WIDTH, y, CELL_WIDTH, CELL_HEIGHT, strength, f"layer {layer}, expert {e}: {share:.2%}"))
            body.append(_text(LEFT + (e + 0.5) * CELL_WIDTH, y + 18, f"{100 * share:.1f}", "middle light" if strength > 0.6 else "middle"))
        figures = f"{experts.imbalance[layer]:.2f} · {experts.entropy_bits[layer]:.3f}"
        body.append(_text(LEFT + count * CELL_WIDTH + 12, y + 18, figures))
    body.append(_text(LEFT, maps_top - 16, "chosen together, share of tokens; white 0, darkest twice an even share or more"))
    even = experts.experts_per_token * (experts.experts_per_token - 1) / (count * (count - 1)) if count > 1 else 1
    for layer, pairs in enumerate(experts.together):
        x, y = LEFT + layer % MAPS_PER_ROW * map_size, maps_top + layer // MAPS_PER_ROW * map_size
        body.append(_text(x, y + 8, f"layer {layer}"))
        for one, row in enumerate(pairs):
            for other, share in enumerate(row):
                at = (x + other * PAIR_CELL, y + 14 + one * PAIR_CELL, PAIR_CELL, PAIR_CELL)
                body.append(_cell(*at, share / even / 2 if even else 0, f"layer {layer}, experts {one} and {other}: {share:.2%}"))
    body.append(_text(LEFT, text_top, "distinct experts of a decode step, per layer", "bold"))
    for i, step in enumerate(experts.distinct, 1):
        chats = f"{step.batch_size} chat{'s' * (step.batch_size > 1)}"
        body.append(_text(LEFT, text_top + 22 * i, f"{chats}: {step.measured:.2f} measured, {step.even:.2f} if drawn evenly"))
    style = "text{font:12px sans-serif;fill:#222}.title{font-size:15px;font-weight:bold}.bold{font-weight:bold}"
    anchors = ".middle{text-anchor:middle}.end{text-anchor:end}text.light{fill:#fff}.cell{stroke:#ccc;stroke-width:.5}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title, quote=True)}">'
        f'<style>{style}{anchors}</style><rect width="{width:g}" height="{height:g}" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def _cell(x: float, y: float, width: float, height: float, strength: float, words: str) -> str:
    """A cell from white (0) to dark blue (1 and above), its value as a tooltip."""
    colour = _mix((255, 255, 255), (20, 60, 120), min(1.0, max(0.0, strength)))
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect class="cell" {place} fill="{colour}"><title>{escape(words)}</title></rect>'


def _mix(light: Sequence[int], dark: Sequence[int], share: float) -> str:
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(light, dark, strict=True))
