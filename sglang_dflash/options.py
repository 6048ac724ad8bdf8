"""What a server's worker reads of its arguments: settled in arguments.py, and fixed for the server's lifetime."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_dflash.draft.config import DraftConfig


@dataclass(frozen=True)
class Options:
    """How a server drafts and verifies; fixed for its lifetime.

    nodes: drafted nodes of a tree (n), so n + 1 tokens are verified; 0 is plain decoding.
    depth: drafted positions (d): no path is longer. 0 where nodes is 0.
    block: tokens of a draft pass, the bonus token included: depth + 1 where the block is causal, else the
        checkpoint's block size.
    chain: keep only the most probable path by greedy descent.
    top_k: candidates a position (K).
    draft_window: how many of a request's committed tokens, the last ones, its draft sees; 0: all.
    """

    draft: DraftConfig
    nodes: int
    depth: int
    block: int
    chain: bool
    top_k: int
    draft_window: int = 0

    @property
    def verified(self) -> int:
        """Tokens a request that a verify pass reads: the bonus token and the nodes."""
        return self.nodes + 1

    @property
    def window(self) -> int:
        """Slots a request that a step writes behind the committed prefix."""
        return max(self.verified, self.block)
