"""Decode steps on a card: Triton's kernels and cuBLAS in one CUDA graph per batch size.

Decides when that way is taken: on an NVIDIA card from Ampere on, for steps of up to 64 rows of one token each. Every other step runs
through the model's own modules, with a kernel for their experts; they compute the same on the same weights, and the tests hold the two
equal. A step of a graph costs the processor one call instead of some thousand, so the card never waits for it.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral_worker.kernels.tables import Tables
from mixtral_worker.model.kv_cache import KVCache
from mixtral_worker.model.moe import MoE
from mixtral_worker.model.transformer import Layer, Transformer
from mixtral_worker.plan import Row
from mixtral_worker.sampling import keys
from mixtral_worker.telemetry import LOG, line

# B rows of one token each, padded to a size that has a graph; W width of the block tables, V vocabulary, L layers.

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
LEAST_CAPABILITY = (8, 0)
MOST_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 2  # so many parts of attention keep a multiprocessor busy
WARM_UPS = 2  # before a capture: kernels are compiled, cuBLAS takes its workspace


@dataclass(frozen=True)
class _Inputs:
    """What changes from step to step, in one buffer, so that one copy brings it. A row of length 0 is padding."""

    buffer: Tensor  # int32
    tokens: Tensor  # [B]
    lengths: Tensor  # [B] positions known once the step is done
    words: Tensor  # [B, 3] how rows are drawn: see the kernel draw
    numbers: Tensor  # [B, 3] float32
    tables: Tensor  # [B, W]

    @classmethod
    def make(cls, rows: int, width: int, device: torch.device, *, pinned: bool = False) -> _Inputs:
        buffer = torch.zeros(rows * (8 + width), dtype=torch.int32, device=device, pin_memory=pinned)
        tokens, lengths, words, numbers, tables = buffer.split_with_sizes([rows, rows, 3 * rows, 3 * rows, rows * width])
        return cls(buffer, tokens, lengths, words.view(rows, 3), numbers.view(torch.float32).view(rows, 3), tables.view(rows, width))


class _Size:
    """Steps of up to so many rows."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        on_card = device.type == "cuda"
        self.rows = rows
        self.given = _Inputs.make(rows, width, torch.device("cpu"), pinned=on_card)
        self.inputs = _Inputs.make(rows, width, device) if on_card else self.given
        self.copied: Any = torch.cuda.Event() if on_card else None  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)
        self.ids = torch.empty(0)

    def fill(self, rows: Sequence[Row], tables: npt.NDArray[np.int32]) -> None:
        if self.copied is not None:
            self.copied.synchronize()  # the last step's inputs may still be on their way
        given, count = self.given, len(rows)
        given.lengths[count:] = 0
        given.tokens[:count] = torch.tensor([row.tokens[0] for row in rows], dtype=torch.int32)
        given.lengths[:count] = torch.tensor([row.end for row in rows], dtype=torch.int32)
        width = max(len(row.blocks) for row in rows)
        given.tables[:count, :width] = torch.from_numpy(tables[[row.slot for row in rows], :width])
        settings = [row.sampling for row in rows]
        given.numbers[:count] = torch.tensor([(s.temperature, math.log(s.min_p) if s.min_p else -math.inf, s.top_p) for s in settings])
        given.words[:count, 0] = torch.tensor([s.top_k for s in settings], dtype=torch.int32)
        given.words[:count, 1:] = keys(torch.tensor([s.seed for s in settings]), torch.tensor([row.offset for row in rows]))
        if self.copied is not None:
            self.inputs.buffer.copy_(given.buffer, non_blocking=True)
            self.copied.record()


class GpuDecode:
    """One rank's model, seen by the kernels. Holds no copy of a weight."""

    def __init__(self, kernels: ModuleType, model: Transformer, cache: KVCache, rotation: Tensor, vocab_size: int, max_rows: int) -> None:
        """Tries and captures every size up to max_rows, at once on all ranks."""
        self._kernels: Any = kernels
        self._model, self._cache, self._shard = model, cache, model.shard
        self._rotation = torch.view_as_real(rotation)
        self._device, self._dtype = model.embedding.device, model.embedding.dtype
        self._n_heads = model.config.n_heads // model.shard.count
        self._vocab_size = vocab_size  # ids that may be drawn
        self._tables = Tables()
        self._counts = torch.zeros(len(model.layers), model.config.n_experts, dtype=torch.int64, device=self._device)
        self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count if model.embedding.is_cuda else 1
        most = next((size for size in SIZES if size >= max_rows), SIZES[-1])
        width = -(-len(rotation) // cache.block_size)
        self._sizes = [_Size(size, width, self._device) for size in SIZES if size <= most]
        if model.embedding.is_cuda:
            self._capture()

    @classmethod
    def make(cls, model: Transformer, cache: KVCache, rotation: Tensor, vocab_size: int, max_rows: int) -> GpuDecode | None:
        """None where the card of any rank, or its software, cannot. Called by all ranks."""
        if not model.embedding.is_cuda:
            return None
        reason, kernels = "", cast(ModuleType | None, None)
        if torch.cuda.get_device_capability(model.embedding.device) < LEAST_CAPABILITY:
            reason = "kernels need an Ampere card or a newer one"
        else:
            try:
                kernels = importlib.import_module("mixtral_worker.kernels.triton_decode")
                grouped = importlib.import_module("mixtral_worker.kernels.triton_experts").grouped_experts
            except ImportError as error:
                reason = f"Triton cannot be used ({error}); pip install triton would make decoding faster"
        if not model.shard.least(kernels is not None, model.embedding.device) or kernels is None:
            LOG.info(line("kernel", path="torch", reason=reason or "another rank cannot use Triton"))
            return None  # ranks that compute in two ways would wait for each other in different places
        for layer in model.layers:
            if isinstance(layer.feed_forward, MoE):
                layer.feed_forward.grouped = grouped
        began_s = time.monotonic()
        made = cls(kernels, model, cache, rotation, vocab_size, max_rows)
        LOG.info(line("kernel", path="triton", graphs=len(made._sizes), rows=made._sizes[-1].rows, after_s=time.monotonic() - began_s))
        return made

    def remember(self, rows: Sequence[Row]) -> None:
        """Called for every step, also those that others compute."""
        self._tables.remember(rows)

    def takes(self, rows: Sequence[Row]) -> bool:
        return len(rows) <= self._sizes[-1].rows and all(len(row.tokens) == 1 for row in rows)

    def logits(self, rows: Sequence[Row], wanted: Sequence[int]) -> Tensor:
        """Store the keys and values of rows that it takes. wanted: places among them → their logits [len(wanted), V]."""
        size = self._run(rows)
        if len(wanted) == len(rows):
            return size.logits[: len(rows)].clone()  # the next step overwrites them
        return size.logits[torch.tensor(wanted, dtype=torch.int64, device=self._device)]

    def ids(self, rows: Sequence[Row]) -> list[int]:
        """As logits, then the id drawn for each row; -1 where its logits are not finite. For rows that are not steered."""
        drawn: list[int] = self._run(rows).ids[: len(rows)].tolist()
        return drawn

    def _run(self, rows: Sequence[Row]) -> _Size:
        size = next(size for size in self._sizes if size.rows >= len(rows))
        size.fill(rows, self._tables.of_slots)
        if size.graph is not None:
            size.graph.replay()
        else:
            size.logits, size.ids = self._step(size.inputs)
        return size

    @property
    def expert_tokens(self) -> npt.NDArray[np.int64]:
        """How often each expert was chosen since the start. [L, E]"""
        counts: npt.NDArray[np.int64] = self._counts.cpu().numpy()
        return counts

    @torch.inference_mode()
    def _capture(self) -> None:
        """The largest first: the smaller ones find its memory free again."""
        pool = None
        for size in reversed(self._sizes):
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._step(size.inputs)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            size.graph = torch.cuda.CUDAGraph()
            # The link's and the watchdog's threads, and NCCL's, may call the driver meanwhile.
            with torch.cuda.graph(size.graph, pool=pool, capture_error_mode="thread_local"):
                size.logits, size.ids = self._step(size.inputs)
            pool = size.graph.pool()
        torch.cuda.synchronize(self._device)

    def _step(self, inputs: _Inputs) -> tuple[Tensor, Tensor]:
        """logits [B, V], ids [B]. Every rank draws, and rank 0 alone was told how: a draw costs less than graphs of two kinds."""
        logits = self._forward(inputs)
        ids = torch.empty_like(inputs.tokens)
        self._kernels.draw(logits, self._vocab_size, inputs.numbers, inputs.words, ids)
        return logits, ids

    def _forward(self, inputs: _Inputs) -> Tensor:
        """Store the rows' keys and values, → logits [B, V]."""
        model, kernels, eps = self._model, self._kernels, self._model.config.norm_eps
        layers = [cast(Layer, layer) for layer in model.layers]
        x = F.embedding(inputs.tokens, model.embedding)  # [B, dim]
        h = torch.empty_like(x)
        kernels.add_norm(x, None, layers[0].attention_norm.weight, eps, h)
        for i, layer in enumerate(layers):
            kernels.add_norm(x, self._attention(i, layer, h, inputs), layer.ffn_norm.weight, eps, h)
            delta = self._experts(i, layer.feed_forward, h, inputs) if isinstance(layer.feed_forward, MoE) else layer.feed_forward(h)
            after = layers[i + 1].attention_norm if i + 1 < len(layers) else model.norm
            kernels.add_norm(x, delta, after.weight, eps, h)
        logits: Tensor = self._shard.concat(model.head(h))
        return logits

    def _attention(self, i: int, layer: Layer, h: Tensor, inputs: _Inputs) -> Tensor:
        kernels, cache, head_dim = self._kernels, self._cache, self._cache.head_dim
        qkv = layer.attention.wqkv(h).view(len(h), -1, head_dim)  # [B, H + 2K, D]
        kv = cache.store[i]
        kernels.rotate_and_store(qkv, self._rotation, inputs.lengths, inputs.tables, kv, self._n_heads, cache.block_size)
        parts = torch.empty(len(h), self._n_heads, self._splits(len(h)), head_dim + 2, device=self._device)
        window = self._model.config.sliding_window or 0
        kernels.attend(qkv, inputs.lengths, inputs.tables, kv, window, parts, self._n_heads, cache.block_size)
        mixed = h.new_empty(len(h), self._n_heads * head_dim)
        kernels.join(parts, mixed)
        out: Tensor = layer.attention.wo(mixed)
        return out

    def _experts(self, i: int, moe: MoE, h: Tensor, inputs: _Inputs) -> Tensor:
        kernels, here, (n_local, hidden) = self._kernels, moe.experts.start, (len(moe.experts), moe.w2.shape[2])
        weights = torch.empty(len(h), self._model.config.n_experts, device=self._device)
        kernels.route(h, moe.gate, inputs.lengths, moe.experts_per_token, moe.normalization == "renorm", weights, self._counts[i])
        up = h.new_empty(n_local, len(h), hidden)
        kernels.experts_up(h, moe.w13, weights, here, up)
        parts = torch.empty(n_local, kernels.down_splits(len(h)), *h.shape, device=self._device)
        kernels.experts_down(up, moe.w2, weights, here, parts)
        out = torch.empty_like(h)
        kernels.mix(parts, weights, here, out)
        return self._shard.sum(out)

    def _splits(self, rows: int) -> int:
        """Parts that a context is cut in, so that few long chats keep the whole card busy."""
        wanted = PROGRAMS_PER_PROCESSOR * self._processors / (rows * self._cache.n_kv_heads)
        return max(1, min(MOST_SPLITS, 1 << round(math.log2(max(1.0, wanted)))))
