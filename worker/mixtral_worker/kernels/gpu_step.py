"""Steps on a card: one CUDA graph of Triton's kernels and cuBLAS for each shape that a step can be padded to.

Decides when that way is taken: on an NVIDIA card from Ampere on, for steps of up to 64 rows of one token and the prompts' tokens beside
them. Every other step runs through the model's own modules, with a kernel for their experts; they compute the same on the same weights,
and the tests hold the two equal. A graph costs the processor one call instead of some thousand, so the card never waits for it.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
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

# A step has D rows of one token (decodes), then C tokens of prompts in tiles of one row each: T = D + C. R = D + M rows in all, M of them
# prompts. W width of the block tables, V vocabulary, L layers.

DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
CHUNKS = (64, 128, 256, 512, 768)  # a step's 512 tokens of prompts may be of many, each padded to whole tiles
PROMPTS = 16  # M, where there are chunks
LEAST_CAPABILITY = (8, 0)
MOST_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 2  # so many parts of attention keep a multiprocessor busy
MOST_READ_WHOLE = 64  # tokens up to which each expert multiplies every token
WARM_UPS = 2  # before a capture: kernels are compiled, cuBLAS takes its workspace


@dataclass(frozen=True)
class _Inputs:
    """What changes from step to step, in one buffer, so that one copy brings it."""

    buffer: Tensor  # int32
    tokens: Tensor  # [T]
    lengths: Tensor  # [T] positions known once the step is done; 0: padding
    owners: Tensor  # [T] rows
    last: Tensor  # [R] each row's last token
    words: Tensor  # [R, 3] how the row is drawn: see triton_rows.draw
    numbers: Tensor  # [R, 3] float32
    tables: Tensor  # [R, W]

    @classmethod
    def make(cls, count: int, rows: int, width: int, device: torch.device, *, pinned: bool = False) -> _Inputs:
        sizes = [count, count, count, rows, 3 * rows, 3 * rows, rows * width]
        buffer = torch.zeros(sum(sizes), dtype=torch.int32, device=device, pin_memory=pinned)
        tokens, lengths, owners, last, words, numbers, tables = buffer.split_with_sizes(sizes)
        drawn = (words.view(rows, 3), numbers.view(torch.float32).view(rows, 3))
        return cls(buffer, tokens, lengths, owners, last, *drawn, tables.view(rows, width))


class _Shape:
    """Steps of up to so many decodes and so many tokens of prompts."""

    def __init__(self, decodes: int, chunk: int, tile: int, width: int, device: torch.device) -> None:
        on_card = device.type == "cuda"
        self.decodes, self.chunk, self._tile = decodes, chunk, tile
        self.prompts = PROMPTS if chunk else 0
        size = (decodes + chunk, decodes + self.prompts, width)
        self._given = _Inputs.make(*size, torch.device("cpu"), pinned=on_card)
        self._arrays = {
            name: getattr(self._given, name).numpy() for name in ("tokens", "lengths", "owners", "last", "words", "numbers", "tables")
        }
        self._arrays["owners"][:decodes] = np.arange(decodes)
        self.inputs = _Inputs.make(*size, device) if on_card else self._given
        self._copied: Any = torch.cuda.Event() if on_card else None  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = self.ids = torch.empty(0)

    def takes(self, decodes: int, prompts: Sequence[Row]) -> bool:
        if decodes > self.decodes or len(prompts) > self.prompts:
            return False
        return sum(self._tiles(row) for row in prompts) * self._tile <= self.chunk

    def fill(self, decodes: int, rows: Sequence[Row], tables: npt.NDArray[np.int32]) -> None:
        """rows: the decodes first."""
        if self._copied is not None:
            self._copied.synchronize()  # the last step's inputs may still be on their way
        given = self._arrays
        given["lengths"][:] = 0
        given["tokens"][:decodes] = [row.tokens[0] for row in rows[:decodes]]
        given["lengths"][:decodes] = [row.end for row in rows[:decodes]]
        given["last"][:decodes] = range(decodes)
        owners, at = [*range(decodes)], self.decodes
        for place, row in enumerate(rows[decodes:]):
            until, owner = at + len(row.tokens), self.decodes + place
            given["tokens"][at:until] = row.tokens
            given["lengths"][at:until] = range(row.start + 1, row.end + 1)
            given["owners"][at : at + self._tiles(row) * self._tile] = owner
            given["last"][decodes + place] = until - 1
            owners.append(owner)
            at += self._tiles(row) * self._tile
        width = max(len(row.blocks) for row in rows)
        given["tables"][owners, :width] = tables[[row.slot for row in rows], :width]
        settings = [row.sampling for row in rows]
        given["numbers"][: len(rows)] = [(s.temperature, math.log(s.min_p) if s.min_p else -math.inf, s.top_p) for s in settings]
        given["words"][: len(rows), 0] = [s.top_k for s in settings]
        given["words"][: len(rows), 1:] = keys(torch.tensor([s.seed for s in settings]), torch.tensor([row.offset for row in rows]))
        if self._copied is not None:
            self.inputs.buffer.copy_(self._given.buffer, non_blocking=True)
            self._copied.record()

    def _tiles(self, row: Row) -> int:
        return -(-len(row.tokens) // self._tile)


class GpuStep:
    """One rank's model, seen by the kernels. Holds no copy of a weight."""

    def __init__(self, model: Transformer, cache: KVCache, rotation: Tensor, vocab_size: int, max_rows: int) -> None:
        """Tries and captures every shape that up to max_rows chats need, at once on all ranks."""
        from mixtral_worker.kernels import triton_attention, triton_experts, triton_rows

        self._rows, self._attention, self._experts = triton_rows, triton_attention, triton_experts
        self._model, self._cache, self._shard = model, cache, model.shard
        self._rotation = torch.view_as_real(rotation)
        self._device = model.embedding.device
        self._n_heads = model.config.n_heads // model.shard.count
        self._vocab_size = vocab_size  # ids that may be drawn
        self._tables = Tables()
        self._counts = torch.zeros(len(model.layers), model.config.n_experts, dtype=torch.int64, device=self._device)
        self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count if model.embedding.is_cuda else 1
        most = next((size for size in DECODES if size >= max_rows), DECODES[-1])
        sizes = [*((size, 0) for size in DECODES if size <= most), *((most, chunk) for chunk in CHUNKS)]
        tile, width = triton_attention.CHUNK_TILE, -(-len(rotation) // cache.block_size)
        self._shapes = [_Shape(*size, tile, width, self._device) for size in sizes]
        for layer in model.layers:
            if isinstance(layer.feed_forward, MoE):
                layer.feed_forward.grouped = triton_experts.grouped_experts
        if model.embedding.is_cuda:
            self._capture()

    @classmethod
    def make(cls, model: Transformer, cache: KVCache, rotation: Tensor, vocab_size: int, max_rows: int) -> GpuStep | None:
        """None where the card of any rank, or its software, cannot. Called by all ranks."""
        if not model.embedding.is_cuda:
            return None
        reason = ""
        if torch.cuda.get_device_capability(model.embedding.device) < LEAST_CAPABILITY:
            reason = "the kernels need an Ampere card or a newer one"
        elif importlib.util.find_spec("triton") is None:
            reason = "Triton is not installed; pip install triton would make every step faster"
        if not model.shard.least(not reason, model.embedding.device):
            LOG.info(line("kernel", path="torch", reason=reason or "another rank cannot use the kernels"))
            return None  # ranks that compute in two ways would wait for each other in different places
        began_s = time.monotonic()
        made = cls(model, cache, rotation, vocab_size, max_rows)
        LOG.info(line("kernel", path="triton", graphs=len(made._shapes), after_s=time.monotonic() - began_s))
        return made

    def remember(self, rows: Sequence[Row]) -> None:
        """Called for every step, also those that others compute."""
        self._tables.remember(rows)

    def takes(self, rows: Sequence[Row], last: Sequence[int]) -> bool:
        """Whether it can compute these rows, and the logits after so many last tokens of each."""
        return max(last) <= 1 and self._shape_for(rows) is not None

    def logits(self, rows: Sequence[Row], last: Sequence[int]) -> Tensor:
        """Store the keys and values of rows that it takes → logits after the last token of rows for which one is wanted, [sum(last), V]."""
        logits = self._run(rows).logits
        if all(last):
            return logits[: len(rows)].clone()  # the next step overwrites them
        return logits[torch.tensor([place for place, count in enumerate(last) if count], dtype=torch.int64, device=self._device)]

    def ids(self, rows: Sequence[Row]) -> list[int]:
        """As logits, then the id drawn for every row that samples; -1 where its logits are not finite. For rows that are not steered."""
        drawn = self._run(rows).ids[: len(rows)].tolist()
        return [id for row, id in zip(rows, drawn, strict=True) if row.samples]

    @property
    def expert_tokens(self) -> npt.NDArray[np.int64]:
        """How often each expert was chosen since the start. [L, E]"""
        counts: npt.NDArray[np.int64] = self._counts.cpu().numpy()
        return counts

    def _shape_for(self, rows: Sequence[Row]) -> _Shape | None:
        """The smallest. Rows of one token come first in a plan."""
        decodes = _decodes(rows)
        return next((shape for shape in self._shapes if shape.takes(decodes, rows[decodes:])), None)

    def _run(self, rows: Sequence[Row]) -> _Shape:
        shape = self._shape_for(rows)
        assert shape is not None, "takes() was not asked"
        shape.fill(_decodes(rows), rows, self._tables.of_slots)
        if shape.graph is not None:
            shape.graph.replay()
        else:
            shape.logits, shape.ids = self._step(shape)
        return shape

    @torch.inference_mode()
    def _capture(self) -> None:
        """The largest first: the smaller ones find its memory free again."""
        pool = None
        for shape in reversed(self._shapes):
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._step(shape)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            shape.graph = torch.cuda.CUDAGraph()
            # The link's and the watchdog's threads, and NCCL's, may call the driver meanwhile.
            with torch.cuda.graph(shape.graph, pool=pool, capture_error_mode="thread_local"):
                shape.logits, shape.ids = self._step(shape)
            pool = shape.graph.pool()
        torch.cuda.synchronize(self._device)

    def _step(self, shape: _Shape) -> tuple[Tensor, Tensor]:
        """logits [R, V], ids [R]. Every rank draws, and rank 0 alone was told how: a draw costs less than graphs of two kinds."""
        inputs = shape.inputs
        h = self._forward(shape)  # [T, dim]
        logits = self._shard.concat(self._model.head(h[inputs.last] if shape.chunk else h))
        ids = torch.empty_like(inputs.last)
        self._rows.draw(logits, self._vocab_size, inputs.numbers, inputs.words, ids)
        return logits, ids

    def _forward(self, shape: _Shape) -> Tensor:
        """Store the tokens' keys and values → what the head multiplies. [T, dim]"""
        model, add_norm, eps = self._model, self._rows.add_norm, self._model.config.norm_eps
        layers = [cast(Layer, layer) for layer in model.layers]
        x = F.embedding(shape.inputs.tokens, model.embedding)  # [T, dim]
        h = torch.empty_like(x)
        add_norm(x, None, layers[0].attention_norm.weight, eps, h)
        for i, layer in enumerate(layers):
            add_norm(x, self._attend(i, layer, h, shape), layer.ffn_norm.weight, eps, h)
            delta = self._feed_forward(i, layer.feed_forward, h, shape.inputs.lengths)
            after = layers[i + 1].attention_norm if i + 1 < len(layers) else model.norm
            add_norm(x, delta, after.weight, eps, h)
        return h

    def _attend(self, i: int, layer: Layer, h: Tensor, shape: _Shape) -> Tensor:
        kernels, cache, inputs, n_heads = self._attention, self._cache, shape.inputs, self._n_heads
        qkv = layer.attention.wqkv(h).view(len(h), -1, cache.head_dim)  # [T, H + 2K, D]
        kv, window, decodes = cache.store[i], self._model.config.sliding_window or 0, shape.decodes
        kernels.rotate_and_store(qkv, self._rotation, inputs.lengths, inputs.owners, inputs.tables, kv, n_heads, cache.block_size)
        mixed = h.new_zeros(len(h), n_heads * cache.head_dim)  # padding stays finite, whatever else it is
        parts = torch.empty(decodes, n_heads, self._splits(decodes), cache.head_dim + 2, device=self._device)
        kernels.attend(qkv[:decodes], inputs.lengths, inputs.tables, kv, window, parts, n_heads, cache.block_size)
        kernels.join(parts, mixed[:decodes])
        if shape.chunk:
            of_chunk = (qkv[decodes:], inputs.lengths[decodes:], inputs.owners[decodes:])
            kernels.attend_chunk(*of_chunk, inputs.tables, kv, window, mixed[decodes:], n_heads, cache.block_size)
        out: Tensor = layer.attention.wo(mixed)
        return out

    def _feed_forward(self, i: int, network: Any, h: Tensor, lengths: Tensor) -> Tensor:
        if not isinstance(network, MoE):
            return cast(Tensor, network(h))
        if len(h) > MOST_READ_WHOLE:
            network.expert_tokens = self._counts[i]
            return network(h, lengths == 0)  # type: ignore[no-any-return]
        kernels, here, (n_local, hidden) = self._experts, network.experts.start, (len(network.experts), network.w2.shape[2])
        weights = torch.empty(len(h), self._model.config.n_experts, device=self._device)
        self._rows.route(h, network.gate, lengths, network.experts_per_token, network.normalization == "renorm", weights, self._counts[i])
        up = h.new_empty(n_local, len(h), hidden)
        kernels.experts_up(h, network.w13, weights, here, up)
        parts = torch.empty(n_local, kernels.down_splits(len(h)), *h.shape, device=self._device)
        kernels.experts_down(up, network.w2, weights, here, parts)
        out = torch.empty_like(h)
        kernels.mix(parts, weights, here, out)
        return self._shard.sum(out)

    def _splits(self, rows: int) -> int:
        """Parts that a context is cut in, so that few long chats keep the whole card busy."""
        wanted = PROGRAMS_PER_PROCESSOR * self._processors / (rows * self._cache.n_kv_heads)
        return max(1, min(MOST_SPLITS, 1 << round(math.log2(max(1.0, wanted)))))


def _decodes(rows: Sequence[Row]) -> int:
    return sum(1 for _ in takewhile(lambda row: len(row.tokens) == 1, rows))
