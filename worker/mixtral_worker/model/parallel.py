"""One rank's share of a layer, and the two collectives that make the shares whole.

Tensor parallelism as in Megatron: a column-parallel layer splits its outputs, a row-parallel layer its inputs, so a pair of them
needs one sum. Expert parallelism as in TensorRT-LLM: ep_size groups of ranks share out the experts, and the ranks of one group split each
of theirs; the same sum adds up experts and splits, so it needs no group of its own. The group comes from fairscale; the layers are ours,
because fairscale's allocate every full weight on every rank.
"""

from dataclasses import dataclass

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """Which of `count` equal parts of the model this process holds. Experts lie in ep_size groups, each in count / ep_size slices."""

    index: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    ep_size: int = 1

    @classmethod
    def current(cls, ep_size: int = 1) -> "Shard":
        """The part this rank holds in fairscale's model-parallel group; the whole where no group was made."""
        if not fairscale_groups.model_parallel_is_initialized():
            return cls()
        index, count = fairscale_groups.get_model_parallel_rank(), fairscale_groups.get_model_parallel_world_size()
        return cls(index, count, fairscale_groups.get_model_parallel_group(), ep_size)

    @property
    def of_expert(self) -> "Shard":
        """Which slice of each of its experts this process holds. Neighbouring ranks hold other experts, as in TensorRT-LLM."""
        return Shard(self.index // self.ep_size, self.count // self.ep_size)

    def experts(self, n_experts: int) -> range:
        """The experts of this process."""
        count = n_experts // self.ep_size
        first = self.index % self.ep_size * count
        return range(first, first + count)

    def sum(self, x: Tensor) -> Tensor:
        """Add up every rank's x, in place. Called by all ranks or none."""
        if self.count > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of every rank's numbers. Called by all ranks or none."""
        if self.count == 1:
            return number
        numbers = torch.tensor(number, device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.group)
        return int(numbers)

    def concat(self, x: Tensor) -> Tensor:
        """Set every rank's x [T, N] side by side → [T, N · count]. Called by all ranks or none."""
        if self.count == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


class ColumnParallelLinear(nn.Module):
    """x [T, in] → this rank's outputs [T, out / count]."""

    def __init__(self, in_features: int, out_features: int, shard: Shard) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features // shard.count, in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RowParallelLinear(nn.Module):
    """This rank's inputs [T, in / count] → the whole output [T, out] on every rank."""

    def __init__(self, in_features: int, out_features: int, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(out_features, in_features // shard.count), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shard.sum(F.linear(x, self.weight))
