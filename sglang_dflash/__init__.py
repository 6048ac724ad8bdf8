"""Lattice-tree DFLASH speculative decoding for SGLang. SGLang finds this package by its entry points."""
