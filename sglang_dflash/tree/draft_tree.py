"""The set of paths one verify pass reads, as a tree under the bonus token."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """Node 0 is the root (the bonus token), then n drafted nodes in best-first order.

    So parents precede children, and the first m drafted nodes are the tree of m nodes. Children of a node
    have distinct tokens.

    tokens: [bs, n+1] int64.
    parents: [bs, n+1] int64, the root its own parent.
    depths: [bs, n+1] int64, the root at 0.
    mask: [bs, n+1, n+1] bool; mask[b, i, j]: node i sees node j, that is j is i or an ancestor of i.
    logp: [bs, n+1] float32, path log-probability, the root at 0.
    max_depth: no node of any request is deeper; known from shapes alone.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    mask: Tensor
    logp: Tensor
    max_depth: int

    def first(self, bs: int) -> DraftTree:
        """The trees of the first bs requests."""
        tokens, parents, depths, mask, logp = (x[:bs] for x in self._tensors())
        return DraftTree(tokens, parents, depths, mask, logp, self.max_depth)

    def smaller(self, nodes: int) -> DraftTree:
        """The tree of its first nodes, in tensors of their own."""
        if nodes + 1 == self.tokens.shape[1]:
            return self
        w = nodes + 1
        tokens, parents, depths = (x[:, :w].contiguous() for x in (self.tokens, self.parents, self.depths))
        mask, logp = self.mask[:, :w, :w].contiguous(), self.logp[:, :w].contiguous()
        return DraftTree(tokens, parents, depths, mask, logp, min(nodes, self.max_depth))

    def take(self, other: DraftTree) -> None:
        """Become a copy of another batch's trees, of the same shape."""
        for mine, given in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(given)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.tokens, self.parents, self.depths, self.mask, self.logp

    @classmethod
    def root(cls, bonus_tokens: Tensor) -> DraftTree:
        """The tree of bonus_tokens [bs] int64 alone: to verify it is plain decoding. Batches of one size share all but
        these, so nothing is launched; nobody is to write them.
        """
        nothing, mask, logp = _of_roots(len(bonus_tokens), bonus_tokens.device)
        return cls(bonus_tokens[:, None], nothing, nothing, mask, logp, 0)


@functools.lru_cache(maxsize=512)
def _of_roots(bs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    nothing = torch.zeros(bs, 1, dtype=torch.int64, device=device)
    return nothing, torch.ones(bs, 1, 1, dtype=torch.bool, device=device), nothing.float()
