"""The demo model as it is trained: a Mixtral in plain dense torch, differentiable and without a cache.

Decides how the weights start and how the experts' loads are balanced. The forward equals the worker's own and transformers' Mixtral; the
names of the weights on disk are those of Mistral's consolidated checkpoints, with rotary pairs side by side.

B rows, S positions, D dim, H heads, E experts, F expert hidden, T tokens (B times S).
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# oneDNN compiles a bf16 kernel for each number of rows it meets; round numbers spare it most of that (1,760 tokens/s without).
ROWS_ROUNDED_TO, POSITIONS_ROUNDED_TO = 128, 16


@dataclass(frozen=True)
class DemoShape:
    """Shape of a Mixtral. Every width divides by 64, so that every int4 group size fits."""

    vocab_size: int = 4096
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 32
    hidden_dim: int = 256
    num_experts: int = 8
    num_experts_per_tok: int = 2
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    max_seq_len: int = 1024

    def params(self) -> dict[str, Any]:
        """What params.json holds."""
        flat = asdict(self)
        moe = {name: flat.pop(name) for name in ("num_experts", "num_experts_per_tok")}
        return {**flat, "moe": moe, "prompt_format": "instruct"}

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> "DemoShape":
        known = {name: value for name, value in params.items() if name in cls.__dataclass_fields__}
        return cls(**known, **params["moe"])


@dataclass
class Balance:
    """How one forward pass spread its tokens over the experts. share [layers, E] sums to 1 per layer; penalty is 1 where all are equal."""

    share: Tensor
    penalty: Tensor


class DemoModel(nn.Module):
    """Mixtral. forward gives the final hidden states; `logits` turns those asked for into logits."""

    def __init__(self, shape: DemoShape, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.compute_dtype = shape, compute_dtype
        self.tok_embeddings = _weight(shape.vocab_size, shape.dim, std=0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.norm = nn.Parameter(torch.ones(shape.dim))
        self.output = _weight(shape.vocab_size, shape.dim, std=0.02)

    def forward(self, ids: Tensor, present: Tensor) -> tuple[Tensor, Balance]:
        """ids [B, S], present [B, S] (False where a row is padded at its end) → hidden [B, S, D] in fp32, balance of the present tokens."""
        hidden = F.embedding(ids, self.tok_embeddings)
        cos, sin = _rotations(self.shape, ids.shape[1], ids.device)
        shares, penalties = [], []
        for layer in self.layers:
            hidden, share, penalty = layer(hidden, cos, sin, present, self.compute_dtype)
            shares.append(share)
            penalties.append(penalty)
        return _rms_norm(hidden, self.norm, self.shape.norm_eps), Balance(torch.stack(shares), torch.stack(penalties).mean())

    def logits(self, hidden: Tensor) -> Tensor:
        return _linear(hidden.to(self.compute_dtype), self.output).float()

    def consolidated(self) -> dict[str, Tensor]:
        """Weights under the names of Mistral's consolidated checkpoints."""
        named: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            if ".experts." in name:  # layers.N.feed_forward.experts.w1 [E, F, D]
                prefix, matrix = name.rsplit(".", 1)
                named |= {f"{prefix}.{expert}.{matrix}.weight": weight for expert, weight in enumerate(tensor.unbind(0))}
            else:
                named[f"{name}.weight"] = tensor
        return named

    def load_consolidated(self, named: dict[str, Tensor]) -> None:
        """Take the weights of a consolidated checkpoint, all of them and no others."""
        state: dict[str, Tensor] = {}
        left = dict(named)
        for name in self.state_dict():
            if ".experts." in name:
                prefix, matrix = name.rsplit(".", 1)
                state[name] = torch.stack([left.pop(f"{prefix}.{expert}.{matrix}.weight") for expert in range(self.shape.num_experts)])
            else:
                state[name] = left.pop(f"{name}.weight")
        if left:
            raise ValueError(f"checkpoint holds {len(left)} tensors that this shape has no place for, such as {next(iter(left))}")
        self.load_state_dict(state)


class Layer(nn.Module):
    def __init__(self, shape: DemoShape) -> None:
        super().__init__()
        self.eps = shape.norm_eps
        self.attention_norm = nn.Parameter(torch.ones(shape.dim))
        self.attention = Attention(shape)
        self.ffn_norm = nn.Parameter(torch.ones(shape.dim))
        self.feed_forward = FeedForward(shape)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, present: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        hidden = hidden + self.attention(_rms_norm(hidden, self.attention_norm, self.eps).to(dtype), cos, sin)
        mixed, share, penalty = self.feed_forward(_rms_norm(hidden, self.ffn_norm, self.eps), present, dtype)
        return hidden + mixed, share, penalty


class Attention(nn.Module):
    def __init__(self, shape: DemoShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.n_heads, shape.n_kv_heads, shape.head_dim
        width, kv_width = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.wq = _weight(width, shape.dim)
        self.wk = _weight(kv_width, shape.dim)
        self.wv = _weight(kv_width, shape.dim)
        self.wo = _weight(shape.dim, width, std=(2 * shape.n_layers * width) ** -0.5)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, positions, _ = hidden.shape
        q = _linear(hidden, self.wq).view(rows, positions, self.heads, self.head_dim)
        k = _linear(hidden, self.wk).view(rows, positions, self.kv_heads, self.head_dim)
        v = _linear(hidden, self.wv).view(rows, positions, self.kv_heads, self.head_dim)
        # fp32 from here: on a CPU, attention's backward takes twice as long in bf16.
        q, k, v = _rotate(q, cos, sin), _rotate(k, cos, sin), v.float()
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        # Rows are padded at their end only, so a causal mask keeps padding out of every present token.
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return _linear(mixed.transpose(1, 2).reshape(rows, positions, -1).to(hidden.dtype), self.wo)


class FeedForward(nn.Module):
    def __init__(self, shape: DemoShape) -> None:
        super().__init__()
        self.chosen = shape.num_experts_per_tok
        self.gate = _weight(shape.num_experts, shape.dim)
        self.experts = Experts(shape)

    def forward(self, hidden: Tensor, present: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.view(-1, hidden.shape[-1])  # [T, D], fp32: the router is never rounded
        odds = F.linear(tokens, self.gate).softmax(-1)
        weights, experts = odds.topk(self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = self.experts(tokens.to(dtype), experts, weights.to(dtype)).view_as(hidden)
        share, penalty = _balance(odds, experts, present.reshape(-1))
        return mixed, share, penalty


class Experts(nn.Module):
    """The experts' matrices, stacked, so that the optimiser turns them all at once."""

    def __init__(self, shape: DemoShape) -> None:
        super().__init__()
        count, dim, hidden_dim = shape.num_experts, shape.dim, shape.hidden_dim
        self.w1 = _weight(count, hidden_dim, dim)
        self.w2 = _weight(count, dim, hidden_dim, std=(2 * shape.n_layers * hidden_dim) ** -0.5)
        self.w3 = _weight(count, hidden_dim, dim)

    def forward(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """tokens [T, D], experts and weights [T, 2] → [T, D]. Each expert sees its tokens as one matrix."""
        chosen = experts.shape[1]
        order = experts.reshape(-1).argsort(stable=True)
        counts = experts.reshape(-1).bincount(minlength=self.w1.shape[0]).tolist()
        pairs = tokens.unsqueeze(1).expand(-1, chosen, -1).reshape(-1, tokens.shape[1])
        grouped = permute(pairs, order)  # [T * chosen, D], expert by expert
        stacks = (stack.to(tokens.dtype).unbind(0) for stack in (self.w1, self.w2, self.w3))
        results = [_expert(group, w1, w2, w3) for group, w1, w2, w3 in zip(torch.split(grouped, counts), *stacks, strict=True)]
        back = permute(torch.cat(results), order.argsort())
        return (back.view(-1, chosen, tokens.shape[1]) * weights.unsqueeze(-1)).sum(1)


def _expert(group: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    rows = F.pad(group, (0, 0, 0, -len(group) % ROWS_ROUNDED_TO))
    return F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, w3), w2)[: len(group)]


class Permute(torch.autograd.Function):
    """Rows in another order. Its own backward: torch's adds row by row, since it cannot know that no row is taken twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradients[0].index_select(0, order.argsort()), None


def permute(rows: Tensor, order: Tensor) -> Tensor:
    permuted: Tensor = Permute.apply(rows, order)  # type: ignore[no-untyped-call]
    return permuted


def _weight(*sizes: int, std: float | None = None) -> nn.Parameter:
    return nn.Parameter(torch.randn(*sizes) * (std if std is not None else sizes[-1] ** -0.5))


def _linear(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden, weight.to(hidden.dtype))


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def _rotations(shape: DemoShape, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, head_dim / 2] of each position's turn of each pair."""
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim)
    angles = torch.outer(torch.arange(positions, device=device).float(), frequencies).unsqueeze(1)
    return angles.cos(), angles.sin()


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [B, S, H, head_dim] → the same in fp32, turned pair by pair, the two of a pair side by side."""
    even, odd = heads.float().view(*heads.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _balance(odds: Tensor, experts: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Switch Transformer's balance term: E times the sum over experts of share of tokens times mean odds."""
    count = odds.shape[1]
    picks = F.one_hot(experts, count).sum(1).float() * present.unsqueeze(1)
    share = picks.sum(0) / picks.sum()
    mean_odds = (odds * present.unsqueeze(1)).sum(0) / present.sum()
    return share, count * (share * mean_odds).sum()
