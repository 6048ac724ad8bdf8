"""Window passes beside SGLang's FlashInfer backend, on any GPU: all of them are the one op's.

FlashInfer reads a tree by a mask as long as the context, packed anew every step, and plans on the host with lengths
that the host does not have. So it serves prefills, and of a window pass the op is told the prefix's slots.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.kernels.ops.attention.trtllm_mha_page_table import build_trtllm_mha_page_table
from sglang.srt.layers.attention import flashinfer_backend
from torch import Tensor

from sglang_dflash.platforms.cuda.attention import WindowAttention


class SlotTables(flashinfer_backend.FlashInferAttnBackend):
    """SGLang's FlashInfer backend, which for a window pass makes a table of the prefixes' slots and nothing else.

    The table is a copy, made before the pass's layers: by the time they read it SGLang may have given a row of its own
    to another request.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner, init_new_workspace=runner.init_new_workspace)
        self.device = runner.device
        self._rows_by_slot = getattr(runner.token_to_kv_pool, "full_to_swa_index_mapping", None)

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
        super().init_forward_metadata_in_graph(forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            self._fill(forward_batch)

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


class FlashInferWindows(WindowAttention, SlotTables):
    """SGLang's FlashInfer backend, with window passes."""

    def pages(self, own_pool: bool) -> tuple[Tensor, int]:
        return self._slots[int(own_pool)], 1

    def own_slots(self) -> Tensor:
        return self._own_slots
