"""The hot ops in plain torch: what each means, and the path a CPU takes."""

from __future__ import annotations

from sglang_dflash.kernels.attention import tree_attention, window_attention
from sglang_dflash.kernels.lattice import lattice_logp, selector_logp, topk_lse
from sglang_dflash.kernels.leads import follow_leads, place_leads
from sglang_dflash.kernels.penalties import count_emitted, penalise
from sglang_dflash.kernels.rows import assign_slots, commit_rows, move_rows, open_window, write_context
from sglang_dflash.kernels.sampling import sample
from sglang_dflash.kernels.tree import grow, grow_chain, walk

__all__ = [
    "assign_slots",
    "commit_rows",
    "count_emitted",
    "follow_leads",
    "grow",
    "grow_chain",
    "lattice_logp",
    "move_rows",
    "open_window",
    "penalise",
    "place_leads",
    "sample",
    "selector_logp",
    "topk_lse",
    "tree_attention",
    "walk",
    "window_attention",
    "write_context",
]
