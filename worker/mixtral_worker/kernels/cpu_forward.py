"""The forward pass of cpu_forward.cpp, as Python calls it.

Decides when that pass can be used: on a CPU, in float32 or bfloat16, for steps of few tokens, where a compiler is found. Every other
step runs through the model's own modules, which compute the same on the same weights; the tests hold the two equal.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixtral_worker.kernels import build
from mixtral_worker.kernels.tables import Tables
from mixtral_worker.model.kv_cache import KVCache
from mixtral_worker.model.moe import MoE
from mixtral_worker.model.transformer import Transformer
from mixtral_worker.plan import Row, places
from mixtral_worker.telemetry import LOG, line

SOURCE = Path(__file__).with_suffix(".cpp")
# In float32 every step, so that no token's logits depend on how it was computed. In bfloat16 oneDNN multiplies more tokens faster, by
# far where the processor has AMX (measured: 512 tokens of the large shape in a quarter of the time, 64 in equal time).
MOST_TOKENS = {torch.float32: 2**31, torch.bfloat16: 48}


class _LayerWeights(Structure):
    _fields_ = [(name, c_void_p) for name in ("attention_norm", "wqkv", "wo", "ffn_norm", "gate", "w13", "w2")]


class _Model(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("is_bf16", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden", "vocab")),
        *((name, c_int32) for name in ("n_experts", "experts_per_token", "first_expert", "local_experts", "block_size", "window")),
        ("eps", c_float),
        ("renormalise", c_int32),
        ("n_blocks", c_int64),
        *((name, c_void_p) for name in ("embedding", "norm", "head", "kv", "rotation")),
        ("layers", POINTER(_LayerWeights)),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("tokens", "wanted", "table_width", "n_threads")),
        *((name, c_void_p) for name in ("ids", "positions", "rows", "wanted_places", "tables")),
        *((name, c_void_p) for name in ("x", "delta", "logits", "expert_tokens", "scratch")),
    ]


class CpuForward:
    """One rank's model, seen by the compiled pass. Holds no copy of a weight."""

    def __init__(self, functions: ctypes.CDLL, model: Transformer, cache: KVCache, rotation: Tensor) -> None:
        self._functions = functions
        self._functions.scratch_bytes.restype = ctypes.c_size_t
        self._transformer, self._cache, self._shard = model, cache, model.shard
        self._layers = (_LayerWeights * len(model.layers))(*(_layer_weights(layer) for layer in model.layers))
        self._rotation = torch.view_as_real(rotation).contiguous()
        self._model = _describe(model, cache, self._rotation, self._layers)
        self._halves = 2 * len(model.layers)
        self._most_tokens = MOST_TOKENS[model.embedding.dtype]
        self._make_room(1)
        self._tables = Tables()
        self._expert_tokens = np.zeros((len(model.layers), model.config.n_experts), np.int32)

    @classmethod
    def make(cls, model: Transformer, cache: KVCache, rotation: Tensor) -> CpuForward | None:
        """None where this model, or the machine of any of its ranks, has to do without. Called by all ranks."""
        if model.embedding.device.type != "cpu" or model.embedding.dtype not in MOST_TOKENS:
            return None
        functions = build.library(SOURCE)
        if not model.shard.least(functions is not None, model.embedding.device) or functions is None:
            return None  # ranks that compute in two ways would sum different things
        LOG.info(line("kernel", path=SOURCE.name, threads=torch.get_num_threads()))
        return cls(functions, model, cache, rotation)

    def remember(self, rows: Sequence[Row]) -> None:
        """Called for every step, also those that others compute."""
        self._tables.remember(rows)

    def takes(self, rows: Sequence[Row], last: Sequence[int]) -> bool:
        return sum(len(row.tokens) for row in rows) <= self._most_tokens

    def logits(self, rows: Sequence[Row], last: Sequence[int]) -> Tensor:
        """Store the keys and values of rows that it takes → logits after so many last tokens of each, [sum(last), V]."""
        wanted = places(rows, last)
        if all(len(row.tokens) == 1 for row in rows):
            flat = [(row.tokens[0], row.start, row.slot) for row in rows]
        else:
            flat = [(token, row.start + i, row.slot) for row in rows for i, token in enumerate(row.tokens)]
        numbers: npt.NDArray[Any] = np.array(flat, np.int64).T.copy()  # [3, T]
        at_wanted = np.array(wanted, np.int64)
        if len(flat) > self._x.shape[1]:
            self._make_room(len(flat))
        logits = torch.empty(len(wanted), self._model.vocab)
        at, tokens, tables = numbers.ctypes.data, len(flat), self._tables.of_slots
        step = _Step(
            *(tokens, len(wanted), tables.shape[1], torch.get_num_threads()),
            *(at, at + 8 * tokens, at + 16 * tokens, at_wanted.ctypes.data, tables.ctypes.data),
            *(self._x[0].data_ptr(), self._x[1].data_ptr(), logits.data_ptr(), self._expert_tokens.ctypes.data, self._scratch.data_ptr()),
        )
        if self._shard.count == 1:
            self._functions.run_halves(byref(self._model), byref(step), 0, self._halves + 1)
            return logits
        for half in range(self._halves):  # each leaves this rank's share of a sum
            self._functions.run_halves(byref(self._model), byref(step), half, half + 1)
            self._shard.sum(self._x[1, :tokens])
        self._functions.run_halves(byref(self._model), byref(step), self._halves, self._halves + 1)
        return self._shard.concat(logits)

    @property
    def expert_tokens(self) -> npt.NDArray[np.int64]:
        """How often each expert was chosen since the start. [L, E]"""
        return self._expert_tokens.astype(np.int64)

    def _make_room(self, tokens: int) -> None:
        self._x = torch.empty(2, tokens, self._model.dim)  # the stream, and what a half layer adds to it
        self._scratch = torch.empty(self._functions.scratch_bytes(byref(self._model), tokens), dtype=torch.uint8)


def _layer_weights(layer: Any) -> _LayerWeights:
    ffn = layer.feed_forward
    w13, w2, gate = (ffn.w13, ffn.w2, ffn.gate.data_ptr()) if isinstance(ffn, MoE) else (ffn.w13.weight, ffn.w2.weight, None)
    attention = layer.attention
    weights = (layer.attention_norm.weight, attention.wqkv.weight, attention.wo.weight, layer.ffn_norm.weight, gate, w13, w2)
    return _LayerWeights(*(weight.data_ptr() if isinstance(weight, Tensor) else weight for weight in weights))


def _describe(model: Transformer, cache: KVCache, rotation: Tensor, layers: Any) -> _Model:
    config, shard, ffn = model.config, model.shard, model.layers[0].feed_forward
    experts = ffn.experts if isinstance(ffn, MoE) else range(1)
    hidden = config.hidden_dim // (shard.of_expert.count if isinstance(ffn, MoE) else shard.count)
    return _Model(
        *(model.embedding.dtype == torch.bfloat16, config.dim, config.n_layers),
        *(config.n_heads // shard.count, cache.n_kv_heads, config.head_dim, hidden, len(model.head.weight)),
        *(config.n_experts, config.experts_per_token, experts.start, len(experts), cache.block_size, config.sliding_window or 0),
        *(config.norm_eps, config.moe_normalization_mode == "renorm", cache.store.shape[3]),
        *(weight.data_ptr() for weight in (model.embedding, model.norm.weight, model.head.weight, cache.store, rotation)),
        layers,
    )
