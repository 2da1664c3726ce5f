"""The mixture of experts: each token goes through the two experts its router likes best."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.parallel import Shard

# T tokens this step, k experts per token, P = T·k pairs of token and expert, E experts of this rank, F hidden size of an expert on it.


Grouped = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""x [T, dim], order [P], ends [E], w13, w2 → [P, dim]: see MoE.compute."""


def route(logits: Tensor, experts_per_token: int, normalization: str = "renorm") -> tuple[Tensor, Tensor]:
    """Choose each token's experts. logits [T, all experts] → weights [T, k] float32, experts [T, k], best first, the lower index of equals.

    TensorRT-LLM's modes. renorm: softmax after the cut, equal to a softmax over all experts whose best k are scaled to sum 1.
    none: the softmax over all experts as it is, so the weights of the best k sum to less than 1.
    """
    ranked, experts = logits.float().sort(dim=-1, descending=True, stable=True)
    if normalization == "none":
        return ranked.softmax(-1)[:, :experts_per_token], experts[:, :experts_per_token]
    return ranked[:, :experts_per_token].softmax(-1), experts[:, :experts_per_token]


class MoE(nn.Module):
    """Every rank holds a slice of every expert, so the load is even whatever the router chooses; with ep_size, of some experts."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        super().__init__()
        self.experts = shard.experts(config.n_experts)
        hidden = config.hidden_dim // shard.of_expert.count
        self.shard = shard
        self.experts_per_token = config.experts_per_token
        self.normalization = config.moe_normalization_mode
        self.grouped: Grouped | None = None  # a kernel that computes what compute does, where the device has one
        self.expert_tokens: Tensor | None = None  # [all experts] where to count how many tokens chose each, if anywhere
        self.gate = nn.Parameter(torch.empty(config.n_experts, config.dim), requires_grad=False)
        self.w13 = nn.Parameter(torch.empty(len(self.experts), 2 * hidden, config.dim), requires_grad=False)  # [E, 2F, dim]
        self.w2 = nn.Parameter(torch.empty(len(self.experts), config.dim, hidden), requires_grad=False)  # [E, dim, F]

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The router's choice for x [T, dim] → weights [T, k] float32, experts [T, k]. The same on every rank."""
        return route(F.linear(x.float(), self.gate.float()), self.experts_per_token, self.normalization)

    def forward(self, x: Tensor, is_padding: Tensor | None = None) -> Tensor:
        """x [T, dim] → [T, dim]; 0 for rows of padding [T], which no expert computes."""
        weights, experts = self.choose(x)
        per_token = experts.shape[1]
        is_left_out = None if is_padding is None else is_padding.repeat_interleave(per_token, output_size=experts.numel())  # [P]
        if self.expert_tokens is not None:
            is_counted = torch.ones_like(experts).flatten() if is_left_out is None else (~is_left_out).long()
            self.expert_tokens.scatter_add_(0, experts.flatten(), is_counted)
        pairs = experts.flatten() - self.experts.start  # [P]
        if self.shard.ep_size > 1:  # another rank computes the others
            is_elsewhere = (pairs < 0) | (pairs >= len(self.experts))
            is_left_out = is_elsewhere if is_left_out is None else is_left_out | is_elsewhere
        if is_left_out is not None:
            pairs.masked_fill_(is_left_out, len(self.experts))  # behind all of this rank's
        order = pairs.argsort(stable=True)  # pairs sorted by expert
        # [E] where each expert's pairs end. Not by bincount: on a GPU it waits for the device to say how long its answer is.
        ends = (pairs <= torch.arange(len(self.experts), device=x.device)[:, None]).sum(1)
        out = self.grouped(x, order, ends, self.w13, self.w2) if self.grouped else self.compute(x, order, ends)  # [P, dim]
        if is_left_out is not None:
            out.masked_fill_(is_left_out[:, None], 0)
        out = out.view(*weights.shape, -1)  # [T, k, dim]
        return self.shard.sum(torch.bmm(weights.to(out.dtype)[:, None], out).squeeze(1))

    def compute(self, x: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        """x [T, dim] → [P, dim], what each pair's expert makes of its token; of pairs of no expert of this rank undefined.

        order [P]: pairs sorted by expert; pair p is of token p // k. ends [E]: where each expert's pairs end in it.
        """
        gathered = x[order // self.experts_per_token]
        by_expert = self._all_at_once(gathered, ends) if x.is_cuda else self._one_after_another(gathered, ends)
        return torch.empty_like(by_expert).index_copy_(0, order, by_expert)

    def _all_at_once(self, x: Tensor, ends: Tensor) -> Tensor:  # [P, dim] → [P, dim]
        """Two products; nothing waits for the GPU to say how many pairs each expert has."""
        offsets = ends.to(torch.int32)
        gated, linear = F.grouped_mm(x, self.w13.transpose(1, 2), offs=offsets).chunk(2, dim=-1)  # each [P, F]
        return F.grouped_mm(F.silu(gated) * linear, self.w2.transpose(1, 2), offs=offsets)

    def _one_after_another(self, x: Tensor, ends: Tensor) -> Tensor:  # [P, dim] → [P, dim]
        """Experts without pairs left out: on a CPU a single token takes 73 µs instead of 88 (dim 256, F 256)."""
        out, first = torch.empty_like(x), 0
        for w13, w2, last in zip(self.w13, self.w2, ends.tolist(), strict=True):
            if last > first:
                gated, linear = F.linear(x[first:last], w13).chunk(2, dim=-1)  # each [·, F]
                torch.mm(F.silu(gated).mul_(linear), w2.t(), out=out[first:last])
            first = last
        return out
