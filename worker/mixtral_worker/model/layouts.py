"""How each layout of a checkpoint names the tensors of Mistral's own, and in what they differ: stacked, transposed, permuted.

The first release of 8x7B stacks a layer's experts: w1, w2 and w3 are [E·F, dim], so w2 lies transposed. Hugging Face permutes the rows of
wq and wk, so that the two numbers of a rotary pair stand half a head apart instead of side by side.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

EXPERT = re.compile(r"(layers\.\d+)\.feed_forward\.experts\.(\d+)\.(w[123])\.weight")
WHOLE = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
NAMES_OF_HUGGINGFACE = (
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("feed_forward.gate", "block_sparse_moe.gate"),
    ("feed_forward.experts", "block_sparse_moe.experts"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
)


@dataclass(frozen=True)
class Location:
    """Where a layout keeps a tensor of Mistral's, and what has become of it there."""

    name: str
    expert: int | None = None  # its place in a stack of all experts
    is_transposed: bool = False
    has_halves: bool = False  # rotary pairs half a head apart

    def stored_shape(self, shape: list[int], n_experts: int) -> list[int]:
        """The shape in the file of a tensor that has this one in the model."""
        rows, *columns = reversed(shape) if self.is_transposed else shape
        return [rows if self.expert is None else rows * n_experts, *columns]

    def stored_cut(self, share: list[range], rows: int) -> list[range]:
        """The part of the file's tensor that makes this part of the model's. rows: of one expert in its stack."""
        first, *others = reversed(share) if self.is_transposed else share
        before = (self.expert or 0) * rows
        return [range(before + first.start, before + first.stop), *others]

    def view(self, place: Tensor, head_dim: int) -> Tensor:
        """The place as the file sees it: what is copied into the view in its order lies right in the place."""
        if self.is_transposed:
            return place.t()
        return halves(place, head_dim) if self.has_halves else place


def halves(pairs: Tensor, head_dim: int) -> Tensor:
    """Rows whose pairs stand side by side → [H, 2, D / 2, ·], a view in the order of Hugging Face's rows."""
    return pairs.view(-1, head_dim // 2, 2, pairs.shape[1]).transpose(1, 2)


Layout = Callable[[str], Location]


def find(names: Iterable[str], is_huggingface: bool) -> Layout:
    if is_huggingface:
        return huggingface
    return first_release if any(".block_sparse_moe." in name for name in names) else Location


def first_release(name: str) -> Location:
    if expert := EXPERT.fullmatch(name):
        layer, number, weight = expert.groups()
        return Location(f"{layer}.block_sparse_moe.{weight}", int(number), weight == "w2")
    return Location(name.replace("feed_forward", "block_sparse_moe"))


def huggingface(name: str) -> Location:
    if name in WHOLE:
        return Location(WHOLE[name])
    has_halves = ".wq." in name or ".wk." in name
    for ours, theirs in NAMES_OF_HUGGINGFACE:
        name = name.replace(ours, theirs)
    return Location(f"model.{name}", has_halves=has_halves)
