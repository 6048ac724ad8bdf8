"""What the target's own samples accept of a draft tree."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.tree.draft_tree import DraftTree


@dataclass(frozen=True)
class Walk:
    """The path each request took from its root, D = the tree's max_depth.

    nodes: [bs, D+1] int64, node index at each walked depth, root first; past the end the last node again.
    tokens: [bs, D+1] int64, the sample at each walked node: the accepted draft tokens, then the target's own
        next token; 0 past the end.
    lens: [bs] int32, walked nodes, hence emitted tokens: 1 to D+1.
    last: [bs] int64, the last of the emitted tokens: the next step's bonus token.
    """

    nodes: Tensor
    tokens: Tensor
    lens: Tensor
    last: Tensor


def walk(tree: DraftTree, sampled: Tensor, max_depth: Tensor | None = None) -> Walk:
    """Follow the target's samples from the root while each is the token of a child.

    sampled [bs, n+1] int64: the target's sample at every node, drawn after the node's path. max_depth [bs]
    int64, >= 0: how many drafted tokens each request may accept at most (0: as plain decoding); None: no limit.

    What is emitted are the target's samples alone, so it is distributed as without a draft, whatever the
    sampling settings.
    """
    if tree.tokens.shape[1] == 1:
        return Walk(tree.parents, sampled, _ones(len(sampled), sampled.device), sampled[:, 0])
    return Walk(*kernels.walk(tree.tokens, tree.parents, tree.mask, sampled, max_depth, tree.max_depth))


@functools.lru_cache(maxsize=512)
def _ones(bs: int, device: torch.device) -> Tensor:
    """What all walks of roots alone come to; nobody is to write it."""
    return torch.ones(bs, dtype=torch.int32, device=device)
