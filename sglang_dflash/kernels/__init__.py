"""The hot ops of a draft step, each once as plain torch: its meaning, and the path a CPU takes.

Every op is vectorised over requests and nodes, has shapes that depend only on its arguments' shapes, and
never asks the device for a value, so a CUDA graph may capture it.
"""

from __future__ import annotations

from sglang_dflash.kernels.lattice import lattice_logp, topk_lse
from sglang_dflash.kernels.tree import ancestor_mask, compaction, grow, grow_chain, walk

__all__ = ["ancestor_mask", "compaction", "grow", "grow_chain", "lattice_logp", "topk_lse", "walk"]
