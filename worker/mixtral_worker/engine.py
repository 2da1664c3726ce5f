"""One step of the model: a plan in, next ids out.

Holds the weights and the KV cache of this rank and turns a StepPlan into tensors. What goes into a plan is the scheduler's, what the
ids mean is the loop's. Every rank calls step with the same plan; rank 0 alone draws the tokens.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixtral_worker.blocks import BLOCK_SIZE
from mixtral_worker.kernels.cpu_forward import CpuForward
from mixtral_worker.kernels.gpu_step import GpuStep
from mixtral_worker.model import checkpoint
from mixtral_worker.model.attention import Batch, Chunk, Decodes
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.kv_cache import KVCache
from mixtral_worker.model.moe import MoE
from mixtral_worker.model.parallel import Shard
from mixtral_worker.model.rope import rotations
from mixtral_worker.model.transformer import Transformer
from mixtral_worker.plan import Row, StepPlan, places
from mixtral_worker.sampling import sample

COUNT_EVERY = 16  # steps of the modules on a GPU, where one small kernel more per layer would be felt in each

SMALLEST_CLASS = 4  # contexts of up to 2⁴ blocks are computed together, then up to 2⁵, 2⁶ …: at most half of the work is padding


class Engine:
    def __init__(self, model: Transformer, cache: KVCache, max_slots: int, max_seq_len: int, vocab_size: int | None = None) -> None:
        self.model = model
        self.cache = cache
        self.config = model.config
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size or self.config.vocab_size  # ids that may be drawn
        self.num_blocks = cache.store.shape[3]
        self.device = cache.store.device
        self.rotation = rotations(torch.arange(max_seq_len, device=self.device), self.config.head_dim, self.config.rope_theta)
        self.fast: CpuForward | GpuStep | None = CpuForward.make(model, cache, self.rotation)  # for steps of few tokens
        self.fast = self.fast or GpuStep.make(model, cache, self.rotation, self.vocab_size, max_slots)
        self.sample_s = 0.0  # spent on drawing ids since the start
        self._expert_tokens = torch.zeros(self.config.n_layers, self.config.n_experts, dtype=torch.int64, device=self.device)

    @classmethod
    def load(
        cls,
        ckpt_dir: str | Path,
        *,
        config: ModelConfig | None = None,
        ep_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_slots: int,
        max_seq_len: int,
        num_blocks: int | None = None,
        vocab_size: int | None = None,
        progress: checkpoint.Progress | None = None,
    ) -> "Engine":
        """Read this rank's share of a checkpoint. Call on every rank, inside ranks.join where there are several.

        config is the folder's own where none is given. num_blocks is the size of the KV cache in blocks of BLOCK_SIZE tokens; without it
        there is room for max_slots sequences of max_seq_len. vocab_size is the tokenizer's: where the model has more ids, those without
        a text are never drawn. Raises ModelError.
        """
        config, shard = config or ModelConfig.read(Path(ckpt_dir)), Shard.current(ep_size)
        config.require_ranks(shard.count, ep_size)
        with torch.device("meta"):  # shapes alone
            model = Transformer(config, shard).to(dtype)
        model.to_empty(device=device)
        checkpoint.load(model, Path(ckpt_dir), progress)
        blocks = num_blocks or max_slots * -(-max_seq_len // BLOCK_SIZE)
        return cls(model, KVCache(config, shard, blocks, BLOCK_SIZE, dtype, device), max_slots, max_seq_len, vocab_size)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> list[int]:
        """Run one forward pass. Returns one id per row that samples, in the plan's order; -1 where the logits are not finite.

        Ranks other than 0 return an empty list. Raises MemoryError where this rank has no room for it; the same rows may be given again.
        """
        try:
            return self._step(plan)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Out here the step's tensors are gone with its traceback.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a collective that another rank has not joined hangs here, not in a later step
            torch.cuda.empty_cache()
        raise MemoryError(reason)

    def _step(self, plan: StepPlan) -> list[int]:
        drawing = [row for row in plan.rows if row.samples]
        steered = [(place, row.steering) for place, row in enumerate(drawing) if row.steering is not None]
        for _, steering in steered:
            steering.look_ahead()
        if isinstance(self.fast, GpuStep) and not steered and self._is_fast(plan.rows, [1] * len(plan.rows)):
            self._wipe_new_blocks(plan.rows)
            ids = self.fast.ids(plan.rows)
            return [] if self.model.shard.index else ids
        logits = self.logits(plan)
        if self.model.shard.index or not drawing:
            return []
        began_s = time.perf_counter()
        settings, offsets = [row.sampling for row in drawing], [row.offset for row in drawing]
        ids = sample(logits[:, : self.vocab_size], settings, offsets, steered).tolist()
        self.sample_s += time.perf_counter() - began_s
        return ids

    def expert_tokens(self) -> npt.NDArray[np.int64] | None:
        """How many tokens each expert was chosen for since the start, [L, E]. None for a dense model.

        On a GPU of every step that a graph computes, and of every 16th other.
        """
        if not self.config.is_moe:
            return None
        counts: npt.NDArray[np.int64] = self._expert_tokens.cpu().numpy()
        return counts + self.fast.expert_tokens if self.fast else counts

    @torch.inference_mode()
    def logits(self, plan: StepPlan, last: Sequence[int] | None = None) -> Tensor:
        """Feed the plan's tokens. Returns the logits after each row that samples, [rows, V] on every rank.

        With `last`: after so many last tokens of each row instead, [sum(last), V].
        """
        self._wipe_new_blocks(plan.rows)
        last = [int(row.samples) for row in plan.rows] if last is None else last
        if self._is_fast(plan.rows, last):
            assert self.fast is not None
            return self.fast.logits(plan.rows, last)
        self._count_experts(self.device.type == "cpu" or plan.step % COUNT_EVERY == 0)
        logits: Tensor = self.model(self._batch(plan.rows), self.cache, self._tensor(places(plan.rows, last)))
        return logits

    def _count_experts(self, wanted: bool) -> None:
        """Let the routers count in the coming pass, or not."""
        for layer, counts in zip(self.model.layers, self._expert_tokens, strict=True):
            if isinstance(layer.feed_forward, MoE):
                layer.feed_forward.expert_tokens = counts if wanted else None

    def _batch(self, rows: Sequence[Row]) -> Batch:
        positions = [p for row in rows for p in range(row.start, row.end)]
        size = self.cache.block_size
        return Batch(
            tokens=self._tensor([token for row in rows for token in row.tokens]),
            rotation=self.rotation[self._tensor(positions)],
            slots=self._tensor([row.blocks[p // size] * size + p % size for row in rows for p in range(row.start, row.end)]),
            parts=tuple(self._parts(rows)),
        )

    def _parts(self, rows: Sequence[Row]) -> Iterator[Decodes | Chunk]:
        first = 0
        for size, alike in groupby(rows, _size_class):
            group = list(alike)
            if size:
                yield self._decodes(first, group)
                first += len(group)
                continue
            for row in group:
                yield self._chunk(first, row)
                first += len(row.tokens)

    def _chunk(self, first: int, row: Row) -> Chunk:
        begin, window = self._first_block(row), self.config.sliding_window
        hidden = begin * self.cache.block_size  # positions before those that the table holds
        positions = torch.arange(hidden, row.end, device=self.device)  # [S]
        queries = positions[row.start - hidden :, None]  # [C, 1]
        mask = positions <= queries if row.start else None
        if window and row.end > window:
            mask = (positions <= queries) & (positions > queries - window)
        return Chunk(slice(first, first + len(row.tokens)), self._tensor([row.blocks[begin:]]), row.end - hidden, mask)

    def _decodes(self, first: int, rows: Sequence[Row]) -> Decodes:
        size, window = self.cache.block_size, self.config.sliding_window
        begins = [self._first_block(row) for row in rows]
        tables = [row.blocks[begin:] for row, begin in zip(rows, begins, strict=True)]
        width = max(map(len, tables))
        # A row that is shorter repeats its own first block: another's might hold NaN, which no mask takes out of a sum.
        table = self._tensor([blocks + blocks[:1] * (width - len(blocks)) for blocks in tables])
        places = torch.arange(width * size, device=self.device)
        ends = self._tensor([row.end - begin * size for row, begin in zip(rows, begins, strict=True)])[:, None]
        is_hidden = places >= ends  # [B, S]
        if window:
            is_hidden |= places < ends - window
        bias = torch.zeros(is_hidden.shape, dtype=self.cache.store.dtype, device=self.device).masked_fill_(is_hidden, -torch.inf)
        return Decodes(slice(first, first + len(rows)), table, bias.repeat(self.cache.n_kv_heads, 1)[:, None])

    def _first_block(self, row: Row) -> int:
        """The first of the row's blocks that any of its tokens looks at."""
        window = self.config.sliding_window
        return max(0, row.start + 1 - window) // self.cache.block_size if window else 0

    def _is_fast(self, rows: Sequence[Row], last: Sequence[int]) -> bool:
        if self.fast is None:
            return False
        self.fast.remember(rows)
        return self.fast.takes(rows, last)

    def _wipe_new_blocks(self, rows: Sequence[Row]) -> None:
        size = self.cache.block_size
        new = [block for row in rows for block in row.blocks[-(-row.start // size) :]]  # those that begin in this step
        if new:
            self.cache.wipe(self._tensor(new))

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def _size_class(row: Row) -> int:
    """Decodes of one class are computed together, all as wide as the longest; 0 is a chunk, which stands alone."""
    return 0 if len(row.tokens) > 1 else max(SMALLEST_CLASS, (len(row.blocks) - 1).bit_length())


def _is_out_of_memory(error: Exception) -> bool:
    """A GPU says it by a class, a CPU's allocator by its words alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
