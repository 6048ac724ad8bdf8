"""Window passes beside any backend of SGLang's: all of them are the one op's, which is told the prefix's slots.

Such a backend serves prefills. Of a window pass it is told nothing: its own ways to read a tree are masks as long as
the context, made anew every step, and what it plans or allocates for one would be for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.kernels.ops.attention.trtllm_mha_page_table import build_trtllm_mha_page_table
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch import Tensor

from sglang_dflash.platforms.cuda.attention import WindowAttention


class SlotTables(AttentionBackend):
    """In front of SGLang's backend: for a window pass a table of the prefixes' slots is made, and nothing else; where
    sliding layers have a pool of their own, another one of their slots there.

    The table is a copy, made before the pass's layers: by the time they read it SGLang may have given a row of its own
    to another request.
    """

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self._graph_tables = self._tables(max_bs)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if not forward_batch.forward_mode.is_target_verify():
            return super().init_forward_metadata(forward_batch)
        self._slots = self._tables(forward_batch.batch_size)
        self._fill(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if not forward_batch.forward_mode.is_target_verify():
            return super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self._slots = self._graph_tables[:, : forward_batch.batch_size]

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        if not forward_batch.forward_mode.is_target_verify():
            return super().init_forward_metadata_in_graph(forward_batch)
        self._fill(forward_batch)

    @property
    def _rows_by_slot(self) -> Tensor | None:
        """Where the pool of sliding layers keeps each slot; None where there is none."""
        return getattr(self.token_to_kv_pool, "full_to_swa_index_mapping", None)

    def _tables(self, bs: int) -> Tensor:
        """[1 or 2, bs, columns]: of the pool, and of that of sliding layers where there is one."""
        columns, pools = self.req_to_token_pool.req_to_token.shape[1], 1 if self._rows_by_slot is None else 2
        return torch.zeros(pools, bs, columns, dtype=torch.int32, device=self.device)

    def _fill(self, forward_batch: Any) -> None:
        """As many slots of each row as its prefix has: what is behind them no op reads."""
        if self._rows_by_slot is not None:
            self._own_slots = self._rows_by_slot[forward_batch.out_cache_loc]
        build_trtllm_mha_page_table(
            req_to_token=self.req_to_token_pool.req_to_token,
            req_pool_indices=forward_batch.req_pool_indices,
            cache_seqlens=forward_batch.seq_lens,
            page_table=self._slots[0],
            page_size=1,
            swa_page_table=None if self._rows_by_slot is None else self._slots[1],
            full_to_swa=self._rows_by_slot,
        )


class SlotWindows(WindowAttention, SlotTables):
    """Window passes for a class that derives from this one first and from SGLang's backend next."""

    def pages(self, own_pool: bool) -> tuple[Tensor, int]:
        return self._slots[int(own_pool)], 1

    def own_slots(self) -> Tensor:
        return self._own_slots
