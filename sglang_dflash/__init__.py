"""Lattice-tree DFLASH speculative decoding for SGLang. SGLang finds this package by its entry points."""

from __future__ import annotations

from importlib import metadata

SGLANG = "0.5.23"  # the release whose internals are hooked; pyproject.toml asks for the same


def other_sglang() -> str:
    """The version of the SGLang installed, where it is not the one this package is made for; else nothing."""
    installed = metadata.version("sglang")
    return "" if installed == SGLANG else installed
