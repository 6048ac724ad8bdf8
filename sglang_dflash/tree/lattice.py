"""What a draft pass says about the next d tokens: K candidates a position, scored given the one before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lattice:
    """K candidates at each of d positions, and the log-probability of each given each one depth before.

    tokens: [bs, d, K] int64, distinct within a position.
    logp: [bs, d, Kp, K] float32, every entry <= 0 (-inf: never). Kp is K, or 1 where the predecessor does
        not matter. The first position follows the bonus token, so there all Kp rows are the same.
    """

    tokens: Tensor
    logp: Tensor

    def __post_init__(self) -> None:
        bs, d, k = self.tokens.shape
        if tuple(self.logp.shape) not in ((bs, d, k, k), (bs, d, 1, k)):
            raise ValueError(
                f"a lattice's logp has shape {tuple(self.logp.shape)}: with tokens of shape {(bs, d, k)} "
                f"give {(bs, d, k, k)}, or {(bs, d, 1, k)} where the predecessor does not matter"
            )
        if self.logp.dtype != torch.float32:
            raise ValueError(
                f"a lattice's logp is {self.logp.dtype}: give torch.float32, grow's order relies on it"
            )

    @property
    def depth(self) -> int:
        """d, the number of drafted positions."""
        return self.tokens.shape[1]

    @property
    def node_count(self) -> int:
        """Nodes of the tree of all paths, without the root: K + K^2 + ... + K^d."""
        k = self.tokens.shape[2]
        return sum(k**depth for depth in range(1, self.depth + 1))
