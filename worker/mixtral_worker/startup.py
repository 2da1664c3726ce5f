"""From settings to a running rank: refuse what cannot work, read this rank's share of the weights, then serve, chat or follow rank 0.

Decides the order of these steps, and how long a context and how large a KV cache this worker has. Every rank comes to the same refusals
before any of them meets the others, so that none is left waiting.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from mixtral_client.protocol import PROTOCOL_VERSION, Sampling, SessionRequest
from mixtral_worker import ranks
from mixtral_worker.blocks import BLOCK_SIZE, BlockPool
from mixtral_worker.engine import Engine
from mixtral_worker.link import Link
from mixtral_worker.link import LinkRefused as LinkRefused
from mixtral_worker.loop import Batch, Crew, run_follower, run_leader
from mixtral_worker.model.config import ModelConfig, ModelError
from mixtral_worker.model.parallel import Shard
from mixtral_worker.plan import PlanCodec
from mixtral_worker.prompt import PromptRefused, resolve_format
from mixtral_worker.ranks import Ranks
from mixtral_worker.scheduler import PREFILL_CHUNK, Scheduler
from mixtral_worker.settings import Settings, SettingsRefused
from mixtral_worker.telemetry import LOG, line
from mixtral_worker.terminal import Manner, TerminalChat
from mixtral_worker.tokenizer import Tokenizer, TokenizerError
from mixtral_worker.watchdog import Signals, Watchdog

REFUSALS = (SettingsRefused, ModelError, TokenizerError, PromptRefused)
KV_SHARE_OF_FREE_MEMORY = 0.5  # of a CPU's, which others use too
PROGRESS_EVERY_S = 2.0


def run(settings: Settings, signals: Signals) -> int:
    """Work as this rank until there is an orderly end; returns the exit code. Raises one of REFUSALS, LinkRefused, or what broke."""
    config = read_config(settings)
    config.require_ranks(settings.tp_size, settings.ep_size)
    max_seq_len = _max_seq_len(settings, config.max_seq_len)
    tokenizer = read_tokenizer(settings.tokenizer_path, config)
    prompt_format = resolve_format(tokenizer, declared_format(settings.ckpt_dir), settings.prompt_format)
    with ExitStack() as stack:
        with redirect_stdout(io.StringIO()):  # fairscale prints, and stdout is the answer's
            here = stack.enter_context(ranks.join(settings.device))
        engine = _load(settings, config, here, max_seq_len, tokenizer.vocab_size)
        codec = PlanCodec(settings.max_batch_size, max_seq_len, PREFILL_CHUNK + settings.max_batch_size, BLOCK_SIZE)
        watchdog = Watchdog(here.rank, settings.step_timeout_s)
        watchdog.start()
        signals.serve(watchdog)
        if not here.is_leader:
            run_follower(engine, here, codec, watchdog)
            return 0
        scheduler = Scheduler(settings.max_batch_size, BlockPool(engine.num_blocks), max_seq_len)
        batch, crew = Batch(scheduler, tokenizer, prompt_format), Crew(engine, here, codec, watchdog)
        return _serve(settings, signals, batch, crew, engine) if settings.api_server else _chat(settings, signals, batch, crew)


def _serve(settings: Settings, signals: Signals, batch: Batch, crew: Crew, engine: Engine) -> int:
    login = SessionRequest(
        endpoint=settings.endpoint_name,
        name=settings.name,
        protocol=PROTOCOL_VERSION,
        version=version("mixtral-chat"),
        model=settings.ckpt_dir.resolve().name,
        device=_device_name(engine.device),
        max_slots=settings.max_batch_size,
        max_seq_len=engine.max_seq_len,
    )
    LOG.info(line("ready", endpoint=settings.endpoint_name, slots=login.max_slots, max_seq_len=login.max_seq_len, device=login.device))
    run_leader(batch, crew, Link(settings.api_server, settings.api_auth_key, login), lambda: signals.received)
    return 0


def _chat(settings: Settings, signals: Signals, batch: Batch, crew: Crew) -> int:
    seed = secrets.randbits(62) if settings.seed is None else settings.seed
    manner = Manner(Sampling(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k), seed)
    code = TerminalChat(batch, crew, manner, lambda: signals.received).run()
    crew.stop()
    return code


def read_config(settings: Settings) -> ModelConfig:
    config = ModelConfig.read(settings.ckpt_dir)
    mode = settings.moe_normalization_mode
    return replace(config, moe_normalization_mode=mode) if mode else config


def _max_seq_len(settings: Settings, allowed: int) -> int:
    if settings.max_seq_len is not None and settings.max_seq_len > allowed:
        raise SettingsRefused(f"--max_seq_len is {settings.max_seq_len:,}; {settings.ckpt_dir} was made for at most {allowed:,}; lower it")
    return settings.max_seq_len or allowed


def declared_format(ckpt_dir: Path) -> str | None:
    """The prompt format that the checkpoint's folder names; only params.json can."""
    path = ckpt_dir / "params.json"
    declared: str | None = json.loads(path.read_text(encoding="utf-8")).get("prompt_format") if path.is_file() else None
    return declared


def read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(f"{path} has {tokenizer.vocab_size:,} ids and the model {config.vocab_size:,}; give the model's own tokenizer")
    return tokenizer


def _load(settings: Settings, config: ModelConfig, here: Ranks, max_seq_len: int, vocab_size: int) -> Engine:
    """Weights and KV cache of this rank, with progress in the log."""
    began_s = told_s = time.monotonic()

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= PROGRESS_EVERY_S and done_bytes < total_bytes:
            told_s = time.monotonic()
            LOG.info(line("loading", read_mb=done_bytes >> 20, of_mb=total_bytes >> 20, percent=100 * done_bytes // total_bytes))

    dtype = dtype_of(settings.dtype, here.device)
    engine = Engine.load(
        settings.ckpt_dir,
        config=config,
        ep_size=settings.ep_size,
        dtype=dtype,
        device=here.device,
        max_slots=settings.max_batch_size,
        max_seq_len=max_seq_len,
        num_blocks=_num_blocks(settings, config, dtype, max_seq_len) if here.device.type == "cpu" else None,
        vocab_size=vocab_size,
        progress=progress,
    )
    weights_bytes = sum(weight.nbytes for weight in engine.model.parameters())
    if here.device.type == "cpu":
        ranks.keep_small_model_to_one_thread(weights_bytes)
    kv_mb = engine.cache.store.nbytes >> 20
    tokens = engine.num_blocks * BLOCK_SIZE
    LOG.info(
        line(
            "loaded",
            weights_mb=weights_bytes >> 20,
            kv_mb=kv_mb,
            kv_tokens=tokens,
            dtype=str(dtype).removeprefix("torch."),
            after_s=time.monotonic() - began_s,
        )
    )
    return engine


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _num_blocks(settings: Settings, config: ModelConfig, dtype: torch.dtype, max_seq_len: int) -> int:
    """Room for every slot at full length, or for what half of this host's free memory holds; the same on every rank."""
    wanted = settings.max_batch_size * -(-max_seq_len // BLOCK_SIZE)
    block_bytes = BLOCK_SIZE * config.kv_bytes_per_token(dtype.itemsize)  # over all ranks: they share this host
    fitting = int(_free_memory_bytes() * KV_SHARE_OF_FREE_MEMORY) // block_bytes
    count = Shard.current().least(max(1, min(wanted, fitting)), torch.device("cpu"))
    if count < wanted:
        LOG.warning(
            line(
                "kv_cache_cut",
                tokens=count * BLOCK_SIZE,
                wanted_tokens=wanted * BLOCK_SIZE,
                then="fewer long chats fit; lower --max_batch_size",
            )
        )
    return count


def _free_memory_bytes() -> int:
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        return next(int(row.split()[1]) for row in meminfo.splitlines() if row.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
