"""What a step may draft: a tree of so many nodes, so deep."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """nodes: drafted nodes of a tree (n), so n + 1 tokens are verified; 0 is plain decoding.

    depth: drafted positions (d), no path is longer; 0 where nodes is 0. block: tokens of the draft pass, the bonus
    token included. most: requests of a batch that may take this shape.
    """

    nodes: int
    depth: int
    block: int
    most: int

    @property
    def verified(self) -> int:
        """Tokens a request that a verify pass reads: the bonus token and the nodes."""
        return self.nodes + 1

    @property
    def window(self) -> int:
        """Slots a request that a step writes behind the committed prefix."""
        return max(self.verified, self.block)
