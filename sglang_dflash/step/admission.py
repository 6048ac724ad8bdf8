"""Requests that a tree's step cannot serve, refused before they are queued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def refusal(original: Callable[[Any, bool], str | None], req: Any, enable_overlap: bool) -> str | None:
    """Why a request is not served, or None; around SGLang's `validate_dflash_request`, which allows these.

    The client gets it as HTTP 400.
    """
    for asked in ("return_hidden_states", "return_sampling_mask"):
        if value := getattr(req, asked):
            return (
                f"{asked} is {value!r}, which DFLASH cannot give of the tokens it drafts: leave it out, or ask a "
                "server without --speculative-algorithm"
            )
    seed = req.sampling_params.sampling_seed
    if seed is not None and not (type(seed) is int and -(2**63) <= seed < 2**63):
        req.sampling_params.sampling_seed = None  # SGLang batches it all the same, to answer it
        return f"the seed is {seed!r}: give a whole number from -2**63 to 2**63 - 1, or none"
    return original(req, enable_overlap)
