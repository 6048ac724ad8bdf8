"""What ranks share: whole tables and logits, the first rank's tree and choice. Real ranks serve in test_lossless."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_dflash.step import ranks
from sglang_dflash.tree import DraftTree, Lattice, grow


def tree(seed: int) -> DraftTree:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(50, generator=generator)[:4] for _ in range(6)]).view(2, 3, 4)
    logp = torch.rand(2, 3, 4, 4, generator=generator).log()
    return grow(Lattice(tokens, logp), torch.tensor([7, 8]), 5)


class SecondOfTwo:
    """The second rank's view of a group, of which the first sends what it is given."""

    world_size, rank_in_group, ranks = 2, 1, [0, 1]

    def __init__(self, first: Tensor) -> None:
        self.first = first

    def broadcast(self, mine: Tensor) -> Tensor:
        return mine.copy_(self.first)

    def all_gather(self, mine: Tensor, dim: int) -> Tensor:
        return torch.cat([self.first, mine], dim)


def test_one_rank_asks_nobody() -> None:
    mine, table = tree(1), torch.rand(3, 4)
    assert ranks.first_ranks_tree(mine) is mine
    assert ranks.whole(table, 0) is table
    assert ranks.first_ranks_number(5) == 5
    assert ranks.is_first()


def test_every_rank_has_the_first_ones_tree() -> None:
    first, mine = tree(1), tree(2)
    assert not mine.tokens.equal(first.tokens) and not mine.parents.equal(first.parents)
    sent: list[Tensor] = []
    group = SimpleNamespace(world_size=2, broadcast=lambda packed: sent.append(packed) or packed)
    with get_parallel().override(tp_size=2, tp_group=group):
        assert ranks.first_ranks_tree(first).parents.equal(first.parents)
    with get_parallel().override(tp_size=2, tp_group=SecondOfTwo(sent[0])):
        got = ranks.first_ranks_tree(mine)
    for name in ("tokens", "parents", "depths", "mask"):
        assert getattr(got, name).equal(getattr(first, name)), name
        assert getattr(got, name).dtype == getattr(first, name).dtype
        assert getattr(got, name).is_contiguous()


@pytest.mark.parametrize("dim", [0, 1])
def test_shares_stand_side_by_side(dim: int) -> None:
    first, mine = torch.rand(3, 4), torch.rand(3, 4)
    with get_parallel().override(tp_size=2, tp_group=SecondOfTwo(first)):
        assert ranks.whole(mine, dim).equal(torch.cat([first, mine], dim))
