"""Gated delta nets in window passes on CUDA: SGLang's kernels, told of trees, with tables of graphs for each width.

The kernels leave at each node the last inputs and the state behind its path, in buffers of their own; what becomes of
them when a path is taken is SGLang's as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend
from torch import Tensor

from sglang_dflash.kernels.tree import parents_of
from sglang_dflash.platforms.cuda import check_room

# What SGLang's backend makes for graphs of one width.
_TABLES = (
    "mamba_track_indices_buf",
    "state_indices_list",
    "query_start_loc_list",
    "retrieve_next_token_list",
    "retrieve_next_sibling_list",
    "retrieve_parent_token_list",
    "cached_cuda_graph_decode_query_start_loc",
    "cached_cuda_graph_verify_query_start_loc",
)


def links(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Trees as SGLang's kernels follow them: each node's first child and next sibling, int32 [bs, w], -1 for none.

    seen [bs, w, w] bool: node i is node j or below it; parents come first, and siblings in the order of their numbers.
    """
    w = seen.shape[1]
    index = torch.arange(w, device=seen.device)
    parents, drafted = parents_of(seen), index > 0
    child = (parents[:, None] == index[:, None]) & drafted
    sibling = (parents[:, None] == parents[..., None]) & (index > index[:, None]) & drafted[:, None]
    next_child, next_sibling = (torch.where(found, index, w).amin(-1) for found in (child, sibling))
    return _or_none(next_child, w), _or_none(next_sibling, w)


def _or_none(nodes: Tensor, w: int) -> Tensor:
    return torch.where(nodes < w, nodes, -1).to(torch.int32)


class WindowStates(GDNAttnBackend):
    """SGLang's backend of gated delta nets, with window passes under `spec_info.window_mask`.

    chains: each token of a window follows the one before it, which SGLang has faster kernels for.
    """

    chains = False

    def make_room(self, requests_by_width: dict[int, int]) -> None:
        """Make the tables of graphs of these widths, each for so many requests; once, as graphs keep the addresses."""
        self._tables: dict[int, dict[str, Any]] = {}
        for width, most in requests_by_width.items():
            for name in _TABLES:
                if name.endswith("_list"):
                    setattr(self, name, [])
            super().init_cuda_graph_state(most, most * width)
            self._tables[width] = {name: getattr(self, name) for name in _TABLES}

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Asked by the graph runner of each width; room is made by then."""
        check_room(max_bs, len(self._tables[max_num_tokens // max_bs]["state_indices_list"]))

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self._follow(forward_batch)
        super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if forward_batch.forward_mode.is_target_verify():
            for name, table in self._tables[forward_batch.spec_info.draft_token_num].items():
                setattr(self, name, table)
        self._follow(forward_batch)
        super().init_forward_metadata_out_graph(forward_batch, in_capture)

    def _follow(self, forward_batch: Any) -> None:
        """Tell the kernels whether there are branches, and which."""
        if not forward_batch.forward_mode.is_target_verify():
            return
        spec_info = forward_batch.spec_info
        self.topk = 1 if self.chains or spec_info.draft_token_num == 1 else 2
        spec_info.retrieve_next_token = spec_info.retrieve_next_sibling = None
        mask = getattr(spec_info, "window_mask", None)
        if self.topk > 1 and mask is not None:  # none where SGLang warms up
            spec_info.retrieve_next_token, spec_info.retrieve_next_sibling = links(mask)


def keep_windows_apart(original: Callable[..., bool], *asked: Any) -> bool:
    """Around SGLang's choice to let the inputs kept at neighbouring nodes overlap: siblings' do not."""
    return False
