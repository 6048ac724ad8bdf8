"""The draft side of a step: what a checkpoint says, its network, its selector, and the lattice they give."""

from __future__ import annotations
