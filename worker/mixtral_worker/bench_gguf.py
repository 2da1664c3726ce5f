"""Weights as llama.cpp reads them: one GGUF file, every number as the model holds it, nothing quantised.

llama.cpp's architecture "llama" is also Mixtral's, its rotary pairs are neighbours as in Mistral's own layout, and it wants norms and
router in float32.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from mixtral_worker.model.moe import MoE
from mixtral_worker.model.transformer import FeedForward, Transformer

ARCHITECTURE = "llama"
KINDS = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}


def write(model: Transformer, path: Path) -> None:
    """Write the whole model, which must not be split over ranks."""
    config = model.config
    file = gguf.GGUFWriter(path, ARCHITECTURE)
    file.add_name("bench")
    file.add_context_length(config.max_seq_len)
    file.add_embedding_length(config.dim)
    file.add_block_count(config.n_layers)
    file.add_feed_forward_length(config.hidden_dim)
    file.add_head_count(config.n_heads)
    file.add_head_count_kv(config.n_kv_heads)
    file.add_key_length(config.head_dim)
    file.add_value_length(config.head_dim)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_theta)
    file.add_layer_norm_rms_eps(config.norm_eps)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("no_vocab")
    if config.is_moe:
        file.add_expert_count(config.n_experts)
        file.add_expert_used_count(config.experts_per_token)
    for name, weight in _tensors(model):
        is_exact = weight.ndim == 1 or "gate_inp" in name
        weight = weight.float() if is_exact else weight
        numbers = weight.contiguous().view(torch.int16).numpy() if weight.dtype == torch.bfloat16 else weight.contiguous().numpy()
        file.add_tensor(f"{name}.weight", np.ascontiguousarray(numbers), raw_dtype=KINDS[weight.dtype])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _tensors(model: Transformer) -> list[tuple[str, Tensor]]:
    config = model.config
    heads = [config.n_heads * config.head_dim, *2 * [config.n_kv_heads * config.head_dim]]
    named = [("token_embd", model.embedding), ("output_norm", model.norm.weight), ("output", model.head.weight)]
    for i, layer in enumerate(model.layers):
        ffn = layer.feed_forward
        parts = [("attn_norm", layer.attention_norm.weight), ("ffn_norm", layer.ffn_norm.weight)]
        parts += zip(("attn_q", "attn_k", "attn_v"), layer.attention.wqkv.weight.split(heads), strict=True)
        parts += [("attn_output", layer.attention.wo.weight)]
        if isinstance(ffn, MoE):
            gate, up = ffn.w13.chunk(2, dim=1)
            parts += [("ffn_gate_inp", ffn.gate), ("ffn_gate_exps", gate), ("ffn_up_exps", up), ("ffn_down_exps", ffn.w2)]
        else:
            assert isinstance(ffn, FeedForward)
            gate, up = ffn.w13.weight.chunk(2)
            parts += [("ffn_gate", gate), ("ffn_up", up), ("ffn_down", ffn.w2.weight)]
        named += [(f"blk.{i}.{name}", weight) for name, weight in parts]
    return named
