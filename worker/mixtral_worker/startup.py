"""From settings to a running rank: refuse what cannot work, read this rank's share of the weights, then serve, chat or follow rank 0.

Decides the order of these steps, and how long a context this worker has. Every rank comes to the same refusals, most of them before it
meets the others, so that none is left waiting.
"""

from __future__ import annotations

import io
import json
import secrets
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from mixtral_client.protocol import PROTOCOL_VERSION, Sampling, SessionRequest
from mixtral_worker import bandwidth, loading, ranks
from mixtral_worker.account import Account
from mixtral_worker.blocks import BLOCK_SIZE, BlockPool
from mixtral_worker.engine import Engine
from mixtral_worker.link import Link
from mixtral_worker.link import LinkRefused as LinkRefused
from mixtral_worker.loading import divide_memory, progress_over_ranks
from mixtral_worker.loop import Batch, Crew, run_follower, run_leader
from mixtral_worker.model.config import ModelConfig, ModelError
from mixtral_worker.plan import PlanCodec
from mixtral_worker.prompt import PromptRefused, resolve_format
from mixtral_worker.ranks import Ranks
from mixtral_worker.scheduler import PREFILL_CHUNK, Scheduler
from mixtral_worker.settings import RANDOM, Settings, SettingsRefused
from mixtral_worker.telemetry import LOG, line
from mixtral_worker.terminal import Manner, TerminalChat
from mixtral_worker.tokenizer import Tokenizer, TokenizerError
from mixtral_worker.watchdog import Signals, Watchdog

REFUSALS = (SettingsRefused, ModelError, TokenizerError, PromptRefused)


class RankEnded(Exception):
    """This rank broke, or lost another. The log says so already."""


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
        engine, max_slots = _load(settings, config, here, max_seq_len, tokenizer.vocab_size)
        codec = PlanCodec(max_slots, max_seq_len, PREFILL_CHUNK + max_slots, BLOCK_SIZE)
        watchdog = Watchdog(here.rank, settings.step_timeout_s)
        watchdog.start()
        signals.serve(watchdog)
        try:
            if not here.is_leader:
                run_follower(engine, here, codec, watchdog)
                return 0
            scheduler = Scheduler(max_slots, BlockPool(engine.num_blocks), max_seq_len)
            reads = bandwidth.bytes_per_s(here.device, here.world, here.world // here.ranks_on_host)
            account = Account(config, loading.PRECISIONS[engine.cache.store.dtype], reads)
            batch, crew = Batch(scheduler, tokenizer, prompt_format), Crew(engine, here, codec, watchdog, account)
            return _serve(settings, signals, batch, crew, engine) if settings.api_server else _chat(settings, signals, batch, crew)
        except LinkRefused:
            raise
        except Exception as error:
            if gone := here.others_gone():
                LOG.error(line("rank_lost", lost=gone, step=watchdog.step, then="ending", reason=str(error).partition("\n")[0]))
            else:
                LOG.exception(line("rank_failed", rank=here.rank, step=watchdog.step))
            raise RankEnded from error


def _serve(settings: Settings, signals: Signals, batch: Batch, crew: Crew, engine: Engine) -> int:
    login = SessionRequest(
        endpoint=settings.endpoint_name,
        name=settings.name,
        protocol=PROTOCOL_VERSION,
        version=version("mixtral-chat"),
        model=checkpoint_name(settings.ckpt_dir),
        device=_device_name(engine.device),
        max_slots=batch.scheduler.max_slots,
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


def checkpoint_name(ckpt_dir: Path) -> str:
    return str(ckpt_dir) if str(ckpt_dir).startswith(RANDOM) else ckpt_dir.resolve().name


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


def _load(settings: Settings, config: ModelConfig, here: Ranks, max_seq_len: int, vocab_size: int) -> tuple[Engine, int]:
    """Weights and KV cache of this rank, and how many chats run together."""
    began_s = time.monotonic()
    dtype = dtype_of(settings.dtype, here.device)
    room = divide_memory(checkpoint_name(settings.ckpt_dir), config, dtype, here, max_seq_len, settings.max_batch_size)
    with progress_over_ranks(here) as progress:
        engine = Engine.load(
            settings.ckpt_dir,
            config=config,
            ep_size=settings.ep_size,
            dtype=dtype,
            device=here.device,
            max_slots=room.max_slots,
            max_seq_len=max_seq_len,
            num_blocks=room.kv_tokens // BLOCK_SIZE,
            vocab_size=vocab_size,
            progress=progress,
        )
    weights_bytes = sum(weight.nbytes for weight in engine.model.parameters())
    if here.device.type == "cpu":
        ranks.keep_small_model_to_one_thread(weights_bytes)
    LOG.info(
        line(
            "loaded",
            ranks=here.world,
            weights_mb=weights_bytes * here.world >> 20,
            kv_mb=engine.cache.store.nbytes * here.world >> 20,
            kv_tokens=room.kv_tokens,
            slots=room.max_slots,
            dtype=str(dtype).removeprefix("torch."),
            after_s=time.monotonic() - began_s,
        )
    )
    return engine, room.max_slots


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
