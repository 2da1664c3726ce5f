"""`torchrun worker perplexity` at work: reads the text, measures it in each precision, prints tables on stdout, writes JSON and SVG.

Decides the order of these steps and what is shown. Every rank comes to the same refusals before any of them meets the others. What a
perplexity is stands in perplexity.py, what the routers chose in expert_report.py.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mixtral_worker import expert_report, perplexity, ranks, startup
from mixtral_worker.blocks import BLOCK_SIZE
from mixtral_worker.engine import Engine
from mixtral_worker.expert_report import Experts
from mixtral_worker.loading import divide_memory
from mixtral_worker.model.config import ModelConfig, ModelError
from mixtral_worker.model.parallel import Shard
from mixtral_worker.perplexity import CONFIDENCE, ENOUGH_UNITS, RESAMPLES, Document, Estimate, Numbers, Outcome, Step, Window
from mixtral_worker.perplexity_cli import PRECISIONS, Asked
from mixtral_worker.prompt import resolve_format
from mixtral_worker.ranks import Ranks
from mixtral_worker.settings import RANDOM, SettingsRefused
from mixtral_worker.tokenizer import Tokenizer

TABLE_WIDTH = 120  # where stdout is no terminal


@dataclass(frozen=True)
class Report:
    """All that was found, as it goes into the JSON."""

    model: str
    text: str
    documents: int
    as_answer_to: str | None
    window: int
    stride: int
    ranks: int
    device: str
    seed: int
    precisions: tuple[str, ...]
    elapsed_s: tuple[float, ...]  # per precision, loading left out
    outcome: Outcome
    experts: Experts | None


def run(asked: Asked) -> int:
    """Measure as this rank; rank 0 alone shows. Returns the exit code. Raises one of startup.REFUSALS, or what broke."""
    config = ModelConfig.read(asked.ckpt_dir)
    config.require_ranks(int(os.environ.get("WORLD_SIZE", "1")))
    if asked.expert_report and not config.is_moe:
        raise SettingsRefused(f"--expert_report needs a model with experts; {asked.ckpt_dir} is a dense one; leave the flag out")
    window, stride = _window_and_stride(asked, config)
    tokenizer = startup.read_tokenizer(asked.tokenizer_path, config)
    documents = _documents(asked, tokenizer)
    windows = [part for i, document in enumerate(documents) for part in perplexity.windows(document, i, window, stride, tokenizer)]
    _require_writable(asked.json, asked.svg)
    with ExitStack() as stack:
        with redirect_stdout(io.StringIO()):  # fairscale prints, and stdout is the result's
            here = stack.enter_context(ranks.join(asked.device))
        _require_same_text(windows, here)
        precisions = tuple(_short_name(startup.dtype_of(PRECISIONS.get(name, name), here.device)) for name in asked.precisions)
        name = startup.checkpoint_name(asked.ckpt_dir)
        blocks = perplexity.blocks_needed(windows, perplexity.together(windows, perplexity.STEP_TOKENS))
        for precision in precisions:
            dtype = getattr(torch, PRECISIONS[precision])
            divide_memory(name, config, dtype, here, context=blocks * BLOCK_SIZE, slots=1, context_flag="--window")
        losses, elapsed_s, experts = [], [], None
        for precision in precisions:
            wants_experts = asked.expert_report and experts is None  # of the first precision
            loss, elapsed, chosen = _measure(asked, precision, windows, here, wants_experts)
            losses.append(loss)
            elapsed_s.append(elapsed)
            experts = experts or chosen
        if here.is_leader:
            report = Report(
                model=name,
                text=asked.text.name,
                documents=len(documents),
                as_answer_to=asked.as_answer_to,
                window=window,
                stride=stride,
                ranks=here.world,
                device=here.device.type,
                seed=asked.seed,
                precisions=precisions,
                elapsed_s=tuple(elapsed_s),
                outcome=perplexity.evaluate(windows, losses, asked.seed),
                experts=experts,
            )
            _show(report, asked)
    return 0


def _measure(
    asked: Asked, precision: str, windows: Sequence[Window], here: Ranks, wants_experts: bool
) -> tuple[Numbers, float, Experts | None]:
    """Losses per window, seconds, and on rank 0 the routers' choices where they are wanted. The weights are gone when it returns."""
    groups = perplexity.together(windows, perplexity.STEP_TOKENS)
    engine = Engine.load(
        asked.ckpt_dir,
        dtype=getattr(torch, PRECISIONS[precision]),
        device=here.device,
        max_slots=1,
        max_seq_len=max(len(window.inputs) for window in windows),
        num_blocks=perplexity.blocks_needed(windows, groups),
    )
    if wants_experts:
        engine.fast = None  # on every rank, so that all reduce the same sums
    began_s = time.monotonic()
    with (
        Progress(
            TextColumn(precision),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not here.is_leader,
        ) as progress,
        expert_report.recording(engine) if wants_experts and here.is_leader else nullcontext() as recorder,
    ):
        task = progress.add_task(precision, total=sum(len(window.targets) for window in windows))

        def on_step(step: Step) -> None:
            progress.advance(task, sum(step.last))
            if recorder is not None:
                recorder.keep(step)

        losses = perplexity.measure(engine, windows, on_step)
    if broken := int((~np.isfinite(losses)).sum()):
        raise ModelError(
            f"{broken} of {len(losses)} windows have logits that are not finite in {precision}; the weights are damaged or too large "
            "for it; measure in fp32 or bf16"
        )
    return losses, time.monotonic() - began_s, None if recorder is None else recorder.report(asked.seed)


# ---- what is asked


def _window_and_stride(asked: Asked, config: ModelConfig) -> tuple[int, int]:
    window = asked.window or config.max_seq_len
    if window > config.max_seq_len:
        raise SettingsRefused(f"--window is {window:,}; {asked.ckpt_dir} was made for at most {config.max_seq_len:,}; lower it")
    stride = asked.stride or max(1, window // 2)
    if stride >= window:
        raise SettingsRefused(f"--stride is {stride:,}; it must be below --window ({window:,}), so that each token has one before it")
    return window, stride


def _documents(asked: Asked, tokenizer: Tokenizer) -> list[Document]:
    try:
        lines = asked.text.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsRefused(f"--text {asked.text} cannot be read ({error}); give a file of UTF-8 text") from error
    texts = [""]
    for line in lines:
        if line.strip() == asked.separator:
            texts.append("")
        else:
            texts[-1] += line
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise SettingsRefused(f"--text {asked.text} holds no text; give a file with at least one word")
    declared = None if str(asked.ckpt_dir).startswith(RANDOM) else startup.declared_format(asked.ckpt_dir)
    prompt_format = resolve_format(tokenizer, declared, asked.prompt_format)
    return perplexity.documents(texts, tokenizer, asked.as_answer_to, prompt_format)


def _require_writable(*paths: Path | None) -> None:
    """Before hours of work, not after."""
    for path in paths:
        if path is not None and not (path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)):
            raise SettingsRefused(f"{path} cannot be written; give a file in a folder that exists")


def _require_same_text(windows: Sequence[Window], here: Ranks) -> None:
    """Ranks with different texts would wait for one another in collectives of different sizes."""
    shard = Shard.current()
    checksum = zlib.crc32(repr([window.inputs for window in windows]).encode())
    if -shard.least(-checksum, here.device) != shard.least(checksum, here.device):
        raise SettingsRefused("--text or the tokenizer differs between the hosts of this torchrun; copy the same files to all of them")


def _short_name(dtype: torch.dtype) -> str:
    return {getattr(torch, long): short for short, long in PRECISIONS.items()}[dtype]


# ---- what is shown


def _show(report: Report, asked: Asked) -> None:
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    console.print(_head(report), highlight=False, soft_wrap=True)
    console.print(_table(report))
    if report.experts is not None:
        for part in expert_report.tables(report.experts):
            console.print(part)
    if asked.json is not None:
        asked.json.write_text(json.dumps(asdict(report), allow_nan=False, indent=2) + "\n", encoding="utf-8")
    if asked.svg is not None and report.experts is not None:
        asked.svg.write_text(expert_report.svg(report.experts, f"{report.model} on {report.text}"), encoding="utf-8")


def _head(report: Report) -> str:
    found = report.outcome
    form = "" if report.as_answer_to is None else f", each as the answer to {report.as_answer_to!r}"
    return (
        f"{report.model} on {report.text}: {_count(report.documents, 'documents')}{form}, "
        f"{found.tokens:,} tokens scored, {found.text_bytes:,} bytes\n"
        f"window {report.window:,}, stride {report.stride:,}, {_count(report.ranks, 'ranks')} on {report.device}; "
        + (
            f"in brackets: {CONFIDENCE:.0%} of {RESAMPLES:,} resamples of {found.units:,} {found.unit}, seed {report.seed}"
            if found.units >= ENOUGH_UNITS
            else f"no interval: {_count(found.units, found.unit)}, an interval takes {ENOUGH_UNITS}; lower --stride"
        )
    )


def _count(number: int, things: str) -> str:
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def _table(report: Report) -> Table:
    compares = len(report.precisions) > 1
    table = Table("", "perplexity", "bits per byte", *([f"perplexity against {report.precisions[0]}"] if compares else []), "tokens/s")
    for column in table.columns[1:]:
        column.justify = "right"
    for precision, result, elapsed_s in zip(report.precisions, report.outcome.results, report.elapsed_s, strict=True):
        delta = "" if result is report.outcome.results[0] else _shown(result.delta, "{:+.4%}")
        table.add_row(
            precision,
            _shown(result.perplexity, "{:.4f}"),
            _shown(result.bits_per_byte, "{:.4f}"),
            *([delta] if compares else []),
            f"{report.outcome.tokens / elapsed_s:,.0f}",
        )
    return table


def _shown(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return form.format(estimate.value)
    return f"{form.format(estimate.value)} \\[{form.format(estimate.low)}, {form.format(estimate.high)}]"
