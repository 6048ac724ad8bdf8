"""What SGLang's kernels of gated delta nets are told: how trees are linked."""

from __future__ import annotations

import torch

from sglang_dflash.platforms.cuda.states import links


def test_trees_are_linked_by_first_children_and_next_siblings() -> None:
    parents = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 3, 4, 5, 6]])
    seen = torch.eye(8, dtype=torch.bool).repeat(2, 1, 1)
    for b, node in torch.cartesian_prod(torch.arange(2), torch.arange(1, 8)).tolist():
        seen[b, node] |= seen[b, parents[b, node]]
    child, sibling = links(seen)
    assert child.dtype == sibling.dtype == torch.int32
    assert child.tolist() == [[1, 3, 5, 6, -1, -1, -1, -1], [1, 2, 3, 4, 5, 6, 7, -1]]
    assert sibling.tolist() == [[-1, 2, -1, 4, -1, -1, 7, -1], [-1] * 8]


def test_a_root_alone_has_neither() -> None:
    assert [x.tolist() for x in links(torch.ones(2, 1, 1, dtype=torch.bool))] == [[[-1], [-1]]] * 2
