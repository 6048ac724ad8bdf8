"""What the compiled ops can take, told before anything is loaded: each refuses more when it is called."""

from __future__ import annotations

NODES = 255  # of a tree or chain: csrc/grow.cu, csrc/walk.cu
CANDIDATES = 32  # a position: a warp's lanes, csrc/grow.cu, csrc/grow_chain.cu, csrc/topk_lse.cu
HEAD_SIZES = (64, 128, 256)  # csrc/write_context.cu, csrc/window_attention.cu


def shared_memory(nodes: int, depth: int, candidates: int, rank: int) -> int:
    """Bytes of shared memory of the block that takes most; rank: of the selector's codebooks, 0 for none.

    Without a selector too a lattice may have leads, and so a row for each candidate before.
    """
    lanes = next(slots for slots in (1, 2, 4, 8) if nodes < slots * 32)  # nodes a lane holds
    grow = depth * candidates * candidates * 5 + lanes * 32 * (12 + 4 * lanes)
    selector = 4 * (2 * candidates * (rank + 1) + candidates * candidates + candidates) if rank else 0
    return max(grow, selector)
