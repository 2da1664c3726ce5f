"""A whole worker small enough for any test: a random Mixtral with a tokenizer of its own, and what it must answer.

`reference` says so by the plainest road: one job alone through the engine, all ids decoded at once.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from mixtral_client.protocol import JobSpec
from mixtral_worker.blocks import BLOCK_SIZE, BlockPool
from mixtral_worker.engine import Engine
from mixtral_worker.plan import PlanCodec, Sampling
from mixtral_worker.prompt import Message, encode_chat, encode_text
from mixtral_worker.scheduler import PREFILL_CHUNK, Scheduler, Sequence
from mixtral_worker.tokenizer import Tokenizer
from support.small_mixtral import write_checkpoint

MAX_SEQ_LEN = 256
POISON_ID = 3
"""The byte 0, which no text holds. Its embedding is NaN: a prompt that holds it has no finite logits."""

SENTENCES = (
    "Once upon a time there was a little cat who wanted to see the sea.",
    "The dog said hello to the cat and they went to the park to play all day.",
    "Es war einmal ein kleiner Bär, der wollte über den Fluss. 猫は海が好きです。",
    "[INST] Tell me a story about a cat and a dog. [/INST]",
)


def write_tiny_worker(folder: Path) -> Path:
    """A checkpoint folder as a worker takes it: params.json, consolidated.safetensors, tokenizer.model."""
    write_checkpoint(folder, "grouped", seed=7)
    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=tokenizer,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())
    vocab_size = Tokenizer(folder / "tokenizer.model").vocab_size
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": vocab_size, "max_seq_len": MAX_SEQ_LEN}))
    weights = load_file(folder / "consolidated.safetensors")
    generator = torch.Generator().manual_seed(11)
    for name, scale in (("tok_embeddings.weight", 1.0), ("output.weight", 0.25)):
        weights[name] = torch.randn(vocab_size, params["dim"], generator=generator) * scale
    weights["tok_embeddings.weight"][POISON_ID] = torch.nan
    weights["output.weight"][POISON_ID] = 0
    save_file(weights, folder / "consolidated.safetensors")
    return folder


@dataclass(frozen=True)
class TinyWorker:
    engine: Engine
    tokenizer: Tokenizer
    codec: PlanCodec

    @classmethod
    def load(cls, folder: Path, max_slots: int = 8) -> TinyWorker:
        engine = Engine.load(folder, max_slots=max_slots, max_seq_len=MAX_SEQ_LEN)
        codec = PlanCodec(max_slots, MAX_SEQ_LEN, PREFILL_CHUNK + max_slots, BLOCK_SIZE)
        return cls(engine, Tokenizer(folder / "tokenizer.model"), codec)

    def scheduler(self, max_slots: int = 8) -> Scheduler:
        return Scheduler(max_slots, BlockPool(self.engine.num_blocks), MAX_SEQ_LEN)


@dataclass(frozen=True)
class Expected:
    ids: list[int]
    text: str
    finish: str


def reference(worker: TinyWorker, spec: JobSpec) -> Expected:
    """What a job must answer, from the engine alone."""
    prompt_ids = _prompt_ids(worker.tokenizer, spec)
    drawn = Sampling(spec.sampling.temperature, spec.sampling.top_p, spec.sampling.top_k, spec.seed, spec.sampling.min_p)
    limit = min(spec.max_tokens, MAX_SEQ_LEN - len(prompt_ids))
    sequence = Sequence("alone", 1, prompt_ids, limit, drawn)
    scheduler = worker.scheduler()
    scheduler.admit(sequence)
    is_chat = spec.messages is not None and spec.messages[-1].role == "user"
    while True:
        plan = scheduler.plan_step()
        assert plan is not None
        scheduler.record(plan, worker.engine.step(plan))
        ids = sequence.produced_ids
        whole = b"".join(worker.tokenizer.token_bytes(id) for id in ids)
        text = (whole.removeprefix(b" ") if is_chat else whole).decode(errors="replace")
        starts = [text.index(stop) for stop in spec.stop if stop in text]
        if starts:
            return Expected(ids, text[: min(starts)], "stop")
        if ids[-1:] == [worker.tokenizer.eos_id]:
            return Expected(ids, text, "stop")
        if len(ids) == limit:
            return Expected(ids, text, "length")


def _prompt_ids(tokenizer: Tokenizer, spec: JobSpec) -> list[int]:
    if spec.messages is not None:
        return encode_chat(tokenizer, [Message(message.role, message.content) for message in spec.messages], "instruct")
    return encode_text(tokenizer, spec.prompt) if isinstance(spec.prompt, str) else list(spec.prompt or ())
