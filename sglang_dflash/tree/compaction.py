"""Where the cache rows of a walk's nodes belong."""

from __future__ import annotations

from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.tree.walk import Walk


def compaction(slots: Tensor, walk: Walk) -> tuple[Tensor, Tensor]:
    """Copies that put the rows of the walked nodes at the front of their window, in path order.

    slots [bs, w] int64: the cache slot of each node of the window, distinct in a request. Returns src and dst
    [bs * (D+1)] int64 for `cache[dst] = cache[src]`, all of src read before any of dst is written. dst holds
    no slot twice; src equals dst where nothing is to move: in place already, or past the walk's end.
    """
    return kernels.compaction(slots, walk.nodes, walk.lens)
