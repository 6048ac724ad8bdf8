"""What a request carries from one step to the next: its bonus token and its length."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.speculative.dflash_info_v2 import DFlashDraftInputV2
from torch import Tensor


class Carry(DFlashDraftInputV2):
    """The running batch's speculative state, in the shape SGLang's scheduler relays, filters and merges."""

    @classmethod
    def of(cls, bonus_tokens: Tensor, new_seq_lens: Tensor) -> Carry:
        """The state after a step: bonus_tokens [bs], the last sample, not yet in the cache; new_seq_lens [bs]."""
        nothing = torch.empty(len(new_seq_lens), 0, device=new_seq_lens.device)
        return cls(
            topk_p=nothing,
            topk_index=nothing,
            hidden_states=nothing,
            bonus_tokens=bonus_tokens.to(torch.int64),
            new_seq_lens=new_seq_lens.to(torch.int64),
        )

    def prepare_for_decode(self, batch: Any) -> None:
        """Allocate the next window, and count the last tokens for penalties as plain decoding does."""
        if batch.sampling_info.penalizer_orchestrator.is_required:
            batch.cumulate_penalty_output_tokens()
        super().prepare_for_decode(batch)
