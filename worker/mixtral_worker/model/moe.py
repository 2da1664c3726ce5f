"""The mixture of experts: each token goes through the two experts its router likes best."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.parallel import Shard

# T tokens this step, k experts per token, P = T·k pairs of token and expert, E experts, F hidden size of an expert on this rank.


def route(logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Choose each token's experts. logits [T, E] → weights [T, k] float32, experts [T, k], best first, the lower index of equals.

    Softmax after the cut: equal to a softmax over all experts whose best k are scaled to sum 1 (TensorRT-LLM's RENORM).
    """
    ranked, experts = logits.float().sort(dim=-1, descending=True, stable=True)
    return ranked[:, :experts_per_token].softmax(-1), experts[:, :experts_per_token]


class MoE(nn.Module):
    """Every rank holds a slice of every expert, so the load is even whatever the router chooses."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        super().__init__()
        hidden = config.hidden_dim // shard.count
        self.shard = shard
        self.experts_per_token = config.experts_per_token
        self.gate = nn.Parameter(torch.empty(config.n_experts, config.dim), requires_grad=False)
        self.w13 = nn.Parameter(torch.empty(config.n_experts, 2 * hidden, config.dim), requires_grad=False)  # [E, 2F, dim]
        self.w2 = nn.Parameter(torch.empty(config.n_experts, config.dim, hidden), requires_grad=False)  # [E, dim, F]

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The router's choice for x [T, dim] → weights [T, k] float32, experts [T, k]."""
        return route(F.linear(x.float(), self.gate.float()), self.experts_per_token)

    def forward(self, x: Tensor) -> Tensor:  # [T, dim] → [T, dim]
        weights, experts = self.choose(x)
        pairs = experts.flatten()  # [P]
        order = pairs.argsort(stable=True)  # pairs sorted by expert
        ends = torch.bincount(pairs, minlength=len(self.gate)).cumsum(0)  # [E] where each expert's pairs end
        compute = self.compute_grouped if x.is_cuda else self.compute_each
        by_expert = compute(x[order // self.experts_per_token], ends)  # [P, dim]
        out = torch.empty_like(by_expert).index_copy_(0, order, by_expert).view(*weights.shape, -1)  # [T, k, dim]
        return self.shard.sum(torch.bmm(weights.to(out.dtype)[:, None], out).squeeze(1))

    def compute_grouped(self, x: Tensor, ends: Tensor) -> Tensor:  # [P, dim] → [P, dim]
        """All experts in two products; nothing waits for the GPU to say how many pairs each expert has."""
        offsets = ends.to(torch.int32)
        gated, linear = F.grouped_mm(x, self.w13.transpose(1, 2), offs=offsets).chunk(2, dim=-1)  # each [P, F]
        return F.grouped_mm(F.silu(gated) * linear, self.w2.transpose(1, 2), offs=offsets)

    def compute_each(self, x: Tensor, ends: Tensor) -> Tensor:  # [P, dim] → [P, dim]
        """One expert after another, those without pairs left out: on a CPU a single token takes 73 µs instead of 88 (dim 256, F 256)."""
        out, first = torch.empty_like(x), 0
        for w13, w2, last in zip(self.w13, self.w2, ends.tolist(), strict=True):
            if last > first:
                gated, linear = F.linear(x[first:last], w13).chunk(2, dim=-1)  # each [·, F]
                torch.mm(F.silu(gated).mul_(linear), w2.t(), out=out[first:last])
            first = last
        return out
