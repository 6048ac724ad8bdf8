"""From a lattice to the tree, or the chain, that is worth verifying."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.tree.draft_tree import DraftTree
from sglang_dflash.tree.lattice import Lattice


def grow(lattice: Lattice, bonus_tokens: Tensor, n: int) -> DraftTree:
    """The tree of the lattice's n most probable paths under bonus_tokens [bs] int64; n = 0 is the root alone.

    Exact, since a child is never more probable than its parent. Ties: lower depth first, then lower parent
    (node index), then higher conditional log-probability, then lower rank (place among the position's K
    candidates). Best-first trees over a block-diffusion draft are DDTree's (arXiv 2604.12989); here they follow
    transitions as well.

    Raises ValueError if n is negative or the lattice holds fewer than n nodes.
    """
    if not 0 <= n <= lattice.node_count:
        raise ValueError(
            f"cannot grow {n} nodes from a lattice of depth {lattice.depth} with {lattice.tokens.shape[2]} "
            f"candidates a position: it holds 0 to {lattice.node_count}; ask for fewer nodes or draft deeper"
        )
    tokens, parents, depths, logp, mask = kernels.grow(lattice.tokens, lattice.logp, bonus_tokens, n)
    return DraftTree(tokens, parents, depths, mask, logp, min(lattice.depth, n))


def grow_chain(lattice: Lattice, bonus_tokens: Tensor, n: int) -> DraftTree:
    """The chain of n nodes by greedy descent: at each depth the best candidate after the one before.

    Ties: lower rank. Raises ValueError if n is negative or deeper than the lattice.
    """
    if not 0 <= n <= lattice.depth:
        raise ValueError(
            f"cannot grow a chain of {n} nodes from a lattice of depth {lattice.depth}: "
            f"ask for 0 to {lattice.depth}, or draft deeper"
        )
    tokens, logp = kernels.grow_chain(lattice.tokens, lattice.logp, bonus_tokens, n)
    bs, w = tokens.shape
    depths = torch.arange(w, device=tokens.device).repeat(bs, 1)
    mask = (depths[:, :, None] >= depths[:, None, :]).contiguous()
    return DraftTree(tokens, (depths - 1).clamp_(min=0), depths, mask, logp, n)
