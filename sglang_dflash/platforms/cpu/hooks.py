"""SGLang functions that have a Triton kernel and no other way, replaced on a plain CPU."""

from __future__ import annotations

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor


def register() -> None:
    """Called by the plug-in where the plain-CPU platform is the active one."""
    for name, function in (("assign_req_to_token_pool_func", assign_slots), ("get_last_loc", last_slots)):
        HookRegistry.register(f"sglang.srt.mem_cache.allocation.{name}", function, HookType.REPLACE)


def assign_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Write newly allocated slots into each request's row of the slot table, at [start, end).

    req_pool_indices, start_offset, end_offset [bs]; out_cache_loc: all requests' slots, one after another.
    """
    lens = (end_offset - start_offset).to(torch.int64)
    rows = req_pool_indices.to(torch.int64).repeat_interleave(lens)
    first = start_offset - (lens.cumsum(0) - lens)
    columns = torch.arange(rows.numel()) + first.repeat_interleave(lens)
    req_to_token[rows, columns] = out_cache_loc.to(req_to_token.dtype)


def last_slots(req_to_token: Tensor, req_pool_indices: Tensor, lens: Tensor) -> Tensor:
    """The slot of each request's last token [bs], -1 where it has none: a page is filled up from there."""
    last = req_to_token[req_pool_indices, (lens - 1).clamp(min=0)].to(lens.dtype)
    return torch.where(lens > 0, last, -1)
