"""The whole network: embedding, layers of attention and experts (of a dense model: one feed-forward network), norm, head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtral_worker.model.attention import Attention, Batch
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.kv_cache import KVCache
from mixtral_worker.model.moe import MoE
from mixtral_worker.model.parallel import ColumnParallelLinear, RowParallelLinear, Shard

# T tokens this step, B rows whose next token is wanted, V vocabulary.


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FeedForward(nn.Module):
    """What a dense model has in the place of experts."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        super().__init__()
        self.w13 = ColumnParallelLinear(config.dim, 2 * config.hidden_dim, shard)
        self.w2 = RowParallelLinear(config.hidden_dim, config.dim, shard)

    def forward(self, x: Tensor) -> Tensor:  # [T, dim] → [T, dim]
        gated, linear = self.w13(x).chunk(2, dim=-1)
        out: Tensor = self.w2(F.silu(gated) * linear)
        return out


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int, shard: Shard) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, index, shard)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MoE(config, shard) if config.is_moe else FeedForward(config, shard)

    def forward(self, x: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        x = x + self.attention(self.attention_norm(x), batch, cache)
        moved: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return moved


class Transformer(nn.Module):
    """Made with uninitialised weights on the default device and in the default dtype; checkpoint.py fills them."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        super().__init__()
        self.config = config
        self.shard = shard
        # The embedding is whole on every rank: a collective per step costs more than 0.3 % of the weights.
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim), requires_grad=False)
        self.layers = nn.ModuleList(Layer(config, i, shard) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = ColumnParallelLinear(config.dim, config.vocab_size, shard)

    def forward(self, batch: Batch, cache: KVCache, wanted: Tensor) -> Tensor:
        """Store the batch's keys and values in the cache. wanted [B] places in the flat batch → their logits [B, V]."""
        x = F.embedding(batch.tokens, self.embedding)  # [T, dim]
        for layer in self.layers:
            x = layer(x, batch, cache)
        logits: Tensor = self.shard.concat(self.head(self.norm(x[wanted])))
        return logits
