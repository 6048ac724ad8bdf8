"""Lattice, draft tree, grow, walk: tensors in, tensors out, nothing of SGLang."""

from __future__ import annotations

from sglang_dflash.tree.draft_tree import DraftTree
from sglang_dflash.tree.grow import grow, grow_chain
from sglang_dflash.tree.lattice import Lattice
from sglang_dflash.tree.walk import Walk, walk

__all__ = ["DraftTree", "Lattice", "Walk", "grow", "grow_chain", "walk"]
