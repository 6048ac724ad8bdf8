"""Tensor parallelism: what every rank must have whole, and what all must decide alike.

Ranks hold shares of the weights and of the KV heads and run the same step. Logits are gathered, so each draws the same
samples; a tree grown from scores that differ in a last bit could differ, and so could a choice made by a clock: these
are the first rank's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_dflash.tree import DraftTree


def is_first() -> bool:
    """Whether this rank speaks for all: in the log and in the metrics."""
    return bool(get_parallel().tp_rank == 0)


def whole(share: Tensor, dim: int) -> Tensor:
    """All ranks' shares of a tensor, side by side along dim; the tensor itself where there is one rank."""
    group = get_parallel().tp_group
    return share if group.world_size == 1 else group.all_gather(share, dim)


def first_ranks_tree(tree: DraftTree) -> DraftTree:
    """The tree that the first rank has grown; its scores, which nothing needs any more, stay each rank's own."""
    group = get_parallel().tp_group
    if group.world_size == 1:
        return tree
    w = tree.tokens.shape[1]
    packed = torch.cat([tree.tokens, tree.parents, tree.depths, tree.mask.flatten(1).long()], 1)
    tokens, parents, depths, mask = (x.contiguous() for x in group.broadcast(packed).split([w, w, w, w * w], 1))
    return replace(tree, tokens=tokens, parents=parents, depths=depths, mask=mask.view(-1, w, w).bool())


def first_ranks_number(number: int) -> int:
    """What the first rank says; the device is not asked."""
    group = get_parallel().tp_group
    if group.world_size == 1:
        return number
    said = torch.tensor(number)
    torch.distributed.broadcast(said, src=group.ranks[0], group=group.cpu_group)
    return int(said)
