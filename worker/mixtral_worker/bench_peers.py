"""Who takes part in `worker bench`: this engine and its peers, each answering the same chats, greedily and to the same length.

`python -m mixtral_worker.bench_peers NAME CKPT_DIR DTYPE DEVICE THREADS EXPORTED` serves one of them: a line of JSON in, the chats; a line
of JSON out, what it answered and when. Each runs in a process of its own, because their thread pools and what they read from the
environment would get in each other's way. Decides how each peer is asked to do its best; what is asked, and what the times mean, is
bench.py's.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mixtral_client.protocol import JobSpec, WorkerJob
from mixtral_client.protocol import Sampling as AskedSampling
from mixtral_worker import bandwidth, ranks
from mixtral_worker.account import Account
from mixtral_worker.bench_cli import OURS
from mixtral_worker.blocks import BLOCK_SIZE, BlockPool
from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.engine import Engine
from mixtral_worker.loading import PRECISIONS
from mixtral_worker.loop import Batch, Crew
from mixtral_worker.plan import Kind, PlanCodec, Row, Sampling, StepPlan
from mixtral_worker.scheduler import PREFILL_CHUNK, Scheduler
from mixtral_worker.settings import RANDOM
from mixtral_worker.startup import dtype_of
from mixtral_worker.tokenizer import Tokenizer
from mixtral_worker.watchdog import Watchdog

MAX_SLOTS, MAX_SEQ_LEN = 32, 1024
HUGGINGFACE, GGUF = "huggingface", "weights.gguf"  # in the folder of the exported weights


@dataclass(frozen=True)
class Chat:
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Answers:
    """Ids per chat, when each chat's first was known, and when all were, in seconds since the chats were handed over."""

    ids: list[list[int]]
    first_s: list[float]
    whole_s: float
    forward_s: float | None = None  # of this engine: how much of that was spent in forward passes
    bandwidth_share: float | None = None  # … and which share of the device's memory bandwidth these reached


class Peer(Protocol):
    def answer(self, chats: Sequence[Chat]) -> Answers: ...


class Ours:
    """The worker's real step loop, from the plan to the text; only the server is missing."""

    def __init__(self, ckpt_dir: Path, dtype: torch.dtype, device: torch.device, threads: int, exported: Path) -> None:
        self._engine = Engine.load(ckpt_dir, dtype=dtype, device=device, max_slots=MAX_SLOTS, max_seq_len=MAX_SEQ_LEN)
        torch.set_num_threads(threads)
        codec = PlanCodec(MAX_SLOTS, MAX_SEQ_LEN, PREFILL_CHUNK + MAX_SLOTS, BLOCK_SIZE)
        self._tokenizer = _Endless(self._engine.config.vocab_size)
        self._bytes_per_s = bandwidth.bytes_per_s(device, 1, 1)
        account = Account(self._engine.config, PRECISIONS[dtype], self._bytes_per_s)
        self._crew = Crew(self._engine, ranks.Ranks(0, 1, device, None), codec, Watchdog(0, 3600.0), account)
        self._asked = 0

    def answer(self, chats: Sequence[Chat]) -> Answers:
        scheduler = Scheduler(MAX_SLOTS, BlockPool(self._engine.num_blocks), MAX_SEQ_LEN)  # anew: nothing kept of the last round's prompts
        batch = Batch(scheduler, self._tokenizer, "instruct")
        ids: list[list[int]] = [[] for _ in chats]
        first_s = [0.0] * len(chats)
        before = self._crew.figures()
        began_s = time.perf_counter()
        for i, chat in enumerate(chats):
            spec = JobSpec(prompt=chat.prompt, sampling=AskedSampling(temperature=0), max_tokens=chat.new_tokens, seed=0)
            refused = batch.take(WorkerJob(id=str(i), attempt=1, spec=spec))
            assert not refused, refused
        while (plan := batch.plan_step()) is not None:
            pieces = batch.record(plan, self._crew.step(plan))
            for piece in pieces:
                chat_ids = ids[int(piece.job)]
                if not chat_ids:
                    first_s[int(piece.job)] = time.perf_counter() - began_s
                assert piece.id is not None, piece
                chat_ids.append(piece.id)
        whole_s = time.perf_counter() - began_s
        after = self._crew.figures()
        forward_s, read = (after[name] - before[name] for name in ("forward_s_total", "step_bytes_total"))
        return Answers(ids, first_s, whole_s, forward_s, read / forward_s / self._bytes_per_s if self._bytes_per_s else None)

    def margins(self, chat: Chat, ids: Sequence[int]) -> list[float]:
        """By how much each id of an answer is better than the best other one, computed from the whole context at once."""
        context = (*chat.prompt, *ids[:-1])
        row = Row(0, 0, context, tuple(range(-(-len(context) // BLOCK_SIZE))), True, 1, Sampling(0))
        scores = self._engine.logits(StepPlan(Kind.STEP, 1, (row,)), [len(ids)]).float().cpu()
        own = scores.gather(1, torch.tensor(ids)[:, None])
        others = scores.scatter(1, torch.tensor(ids)[:, None], -torch.inf).max(-1, keepdim=True).values
        return [float(margin) for margin in (own - others)[:, 0]]


class _Endless(Tokenizer):
    """The demo's tokenizer for a model of any vocabulary, whose answers go on to the length asked for."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(DEMO_CKPT_DIR / "tokenizer.model")
        self._known = self.vocab_size
        self.vocab_size, self.eos_id = vocab_size, -1

    def token_bytes(self, token_id: int) -> bytes:
        return super().token_bytes(token_id % self._known)


class Transformers:
    """Hugging Face's generate: all chats in one batch, shorter prompts padded, all as long as the longest."""

    def __init__(self, ckpt_dir: Path, dtype: torch.dtype, device: torch.device, threads: int, exported: Path) -> None:
        torch.set_num_threads(threads)
        self._model = _huggingface(exported).to(device)

    def answer(self, chats: Sequence[Chat]) -> Answers:
        from transformers import StoppingCriteriaList

        width, longest = max(len(chat.prompt) for chat in chats), max(chat.new_tokens for chat in chats)
        ids = torch.tensor([[0] * (width - len(chat.prompt)) + chat.prompt for chat in chats])
        mask = torch.tensor([[0] * (width - len(chat.prompt)) + [1] * len(chat.prompt) for chat in chats])
        clock = _FirstToken(len(chats), self._model.device)
        began_s = time.perf_counter()
        out = self._model.generate(
            input_ids=ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        whole_s = time.perf_counter() - began_s
        answers = [row[width : width + chat.new_tokens].tolist() for row, chat in zip(out, chats, strict=True)]
        return Answers(answers, [clock.first_s - began_s] * len(chats), whole_s)


class _FirstToken:
    """Asked after each token whether to stop; notes when it was asked first."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.first_s = 0.0
        self._go_on = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: Any) -> Tensor:
        self.first_s = self.first_s or time.perf_counter()
        return self._go_on


class TransformersContinuous:
    """Hugging Face's continuous batching."""

    def __init__(self, ckpt_dir: Path, dtype: torch.dtype, device: torch.device, threads: int, exported: Path) -> None:
        import transformers

        library: Any = transformers
        torch.set_num_threads(threads)
        self._model = _huggingface(exported).to(device)
        generation = library.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=MAX_SEQ_LEN)
        sizes = library.ContinuousBatchingConfig(
            page_size=32, num_blocks=MAX_SLOTS * MAX_SEQ_LEN // 32, max_batch_tokens=PREFILL_CHUNK + MAX_SLOTS, allow_block_sharing=False
        )
        self._manager = self._model.init_continuous_batching(generation, sizes)
        self._manager.start()

    def answer(self, chats: Sequence[Chat]) -> Answers:
        began_s = time.perf_counter()
        asked = {}
        for i, chat in enumerate(chats):
            asked[self._manager.add_request(chat.prompt, max_new_tokens=chat.new_tokens, record_timestamps=True)] = i
        ids: list[list[int]] = [[] for _ in chats]
        first_s = [0.0] * len(chats)
        left = len(chats)
        while left:
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended by itself")
                continue
            if result.is_finished():
                i = asked[result.request_id]
                if result.error:
                    raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
                ids[i], first_s[i] = list(result.generated_tokens), result.timestamps[0] - began_s
                left -= 1
        return Answers(ids, first_s, time.perf_counter() - began_s)


class LlamaCpp:
    """llama.cpp through its low-level batch: as many sequences as there are chats, those that are done leave."""

    def __init__(self, ckpt_dir: Path, dtype: torch.dtype, device: torch.device, threads: int, exported: Path) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(exported / GGUF).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {exported / GGUF}")
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = MAX_SLOTS * MAX_SEQ_LEN
        wanted.n_batch = wanted.n_ubatch = PREFILL_CHUNK + MAX_SLOTS
        wanted.n_seq_max = MAX_SLOTS
        wanted.n_threads = wanted.n_threads_batch = threads
        if dtype == torch.float32:  # its default for keys and values, float16, would not be the same computation
            wanted.type_k = wanted.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(PREFILL_CHUNK + MAX_SLOTS, 0, 1)

    def answer(self, chats: Sequence[Chat]) -> Answers:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        ids: list[list[int]] = [[] for _ in chats]
        first_s = [0.0] * len(chats)
        began_s = time.perf_counter()
        for some in _chunks(chats):
            self._decode([(token, p, i, p == len(chats[i].prompt) - 1) for i in some for p, token in enumerate(chats[i].prompt)], ids)
            for i in some:
                first_s[i] = time.perf_counter() - began_s
        while going_on := [i for i, chat in enumerate(chats) if len(ids[i]) < chat.new_tokens]:
            self._decode([(ids[i][-1], len(chats[i].prompt) + len(ids[i]) - 1, i, True) for i in going_on], ids)
        return Answers(ids, first_s, time.perf_counter() - began_s)

    def _decode(self, tokens: list[tuple[int, int, int, bool]], ids: list[list[int]]) -> None:
        """Feed (token, position, sequence, whether its next is wanted); append what comes next to each sequence's ids."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, (token, position, sequence, is_wanted) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, is_wanted
        if self._c.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        for at, (_, _, sequence, is_wanted) in enumerate(tokens):
            if is_wanted:
                scores = ctypes.cast(self._c.llama_get_logits_ith(self._context, at), ctypes.POINTER(ctypes.c_float * self._vocab_size))
                ids[sequence].append(int(np.frombuffer(scores.contents, np.float32).argmax()))


def _chunks(chats: Sequence[Chat]) -> Iterator[list[int]]:
    """Prompts that fit a batch together."""
    some: list[int] = []
    for i, chat in enumerate(chats):
        if some and sum(len(chats[j].prompt) for j in some) + len(chat.prompt) > PREFILL_CHUNK:
            yield some
            some = []
        some.append(i)
    yield some


def _huggingface(folder: Path) -> Any:
    import transformers

    library: Any = transformers  # in part without types
    model = library.AutoModelForCausalLM.from_pretrained(folder / HUGGINGFACE, dtype="auto")
    model.generation_config = library.GenerationConfig()  # its own would end answers at EOS
    return model.eval()


PEERS: dict[str, type[Any]] = {
    OURS: Ours,
    "transformers": Transformers,
    "transformers-continuous": TransformersContinuous,
    "llama.cpp": LlamaCpp,
}


def main() -> None:
    name, ckpt_dir, dtype, kind, threads, exported = sys.argv[1:]
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; the answers' line is ours alone
    folder = Path(ckpt_dir) if ckpt_dir.startswith(RANDOM) else Path(ckpt_dir).resolve()
    with torch.inference_mode():
        peer = PEERS[name](folder, dtype_of(dtype, device), device, int(threads), Path(exported))
        print(json.dumps("ready"), file=out, flush=True)
        for row in sys.stdin:
            asked = json.loads(row)
            chats = [Chat(**chat) for chat in asked["chats"]]
            answer = peer.margins(chats[0], asked["margins_of"]) if "margins_of" in asked else asdict(peer.answer(chats))
            print(json.dumps(answer), file=out, flush=True)
    out.flush()
    os._exit(0)  # transformers' manager has a thread that nothing ends


if __name__ == "__main__":
    main()
