"""What a server's worker reads of its arguments: settled in arguments.py, and fixed for the server's lifetime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_dflash.budget import Shape
from sglang_dflash.draft.config import DraftConfig


@dataclass(frozen=True)
class Options:
    """How a server drafts and verifies; fixed for its lifetime.

    shapes: what a step may draft, ascending by nodes; one, where the user fixed it. chain: keep only the most probable
    path by greedy descent. top_k: candidates a position (K). draft_window: how many of a request's committed tokens,
    the last ones, its draft sees; 0: all. mask_embedding: the file of the mask's own embedding, if the draft has one.
    prompts_join: whether verify passes may read prompts beside their trees.
    """

    draft: DraftConfig
    shapes: tuple[Shape, ...]
    chain: bool
    top_k: int
    draft_window: int = 0
    mask_embedding: Path | None = None
    prompts_join: bool = False

    @property
    def largest(self) -> Shape:
        """The shape that room is made for."""
        return self.shapes[-1]

    @property
    def window(self) -> int:
        """Slots a request that a step may write behind the committed prefix."""
        return max(shape.window for shape in self.shapes)

    @property
    def leads(self) -> int:
        """Candidates a position that may make way for leads: all paths of the others still fill every tree."""
        return max(m for m in range(3 * self.top_k // 4 + 1) if all(self._held(shape, m) for shape in self.shapes))

    def _held(self, shape: Shape, leads: int) -> bool:
        return sum((self.top_k - leads) ** depth for depth in range(1, shape.depth + 1)) >= shape.nodes

    def verify_widths(self) -> dict[int, int]:
        """Tokens a request of the passes that verify, and how many requests each may have."""
        return {shape.verified: shape.most for shape in self.shapes}

    def draft_widths(self) -> dict[int, int]:
        """The same of draft passes; several shapes may share one."""
        blocks: dict[int, int] = {}
        for shape in self.shapes:
            if shape.nodes:
                blocks[shape.block] = max(shape.most, blocks.get(shape.block, 0))
        return blocks

    def grown(self, block: int) -> Shape:
        """The largest shape whose draft pass has this width; the first nodes of its tree are the smaller trees."""
        return max((s for s in self.shapes if s.nodes and s.block == block), key=lambda shape: shape.nodes)
