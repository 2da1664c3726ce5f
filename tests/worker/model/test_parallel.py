"""Two real ranks over gloo compute what one rank, fairscale's layers and transformers compute."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_worker.model.parallel import Shard
from support import two_ranks
from support.checkpoint_layouts import LAYOUTS
from support.small_mixtral import SHAPES, as_transformers


@pytest.mark.parametrize("layer", ["column", "row", "embedding"])
def test_sharded_layer_equals_that_of_fairscale(layer: str, of_two_ranks: dict[str, Any]) -> None:
    ours, theirs = of_two_ranks["layers"][layer]
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "ep_size"), [*((shape, 1) for shape in SHAPES), *((shape, 2) for shape in SHAPES if "experts" in SHAPES[shape])]
)
def test_two_ranks_give_the_logits_of_transformers_from_every_layout(
    shape: str, ep_size: int, of_two_ranks: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    ids = [*two_ranks.PROMPTS[2], 18]
    with torch.inference_mode():
        expected = as_transformers(checkpoints[shape], tmp_path)(torch.tensor([ids])).logits[0, -2:]
    for name in (shape, *(layout for layout in LAYOUTS if LAYOUTS[layout] == shape)):
        ours = of_two_ranks["logits"][name, ep_size]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("count", "ep_size"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2)])
def test_every_slice_of_every_expert_has_one_rank(count: int, ep_size: int) -> None:
    shards = [Shard(index, count, ep_size=ep_size) for index in range(count)]
    held = [(expert, shard.of_expert.index) for shard in shards for expert in shard.experts(8)]
    assert sorted(held) == [(expert, part) for expert in range(8) for part in range(count // ep_size)]
    assert {shard.of_expert.count for shard in shards} == {count // ep_size}


def test_one_rank_needs_no_group() -> None:
    x = torch.ones(2, 3)
    assert Shard.current() == Shard(0, 1, None)
    assert Shard().sum(x) is x
    assert Shard().concat(x) is x
    assert Shard().least(7, x.device) == 7
