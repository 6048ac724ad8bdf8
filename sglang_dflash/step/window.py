"""The window: the slots behind each request's committed prefix that one step writes.

The draft block and the tree are both read in a window pass: w tokens a request at once, each seeing the whole prefix
and those window tokens that a mask names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.budget import Shape


@dataclass
class WindowInput(DFlashVerifyInput):
    """What SGLang's forward and attention backends read of a window pass.

    window_mask [bs, w, w] bool: window token i sees window token j. draft_token, positions [bs * w] int64.
    """

    window_mask: Tensor | None = None


@dataclass(frozen=True)
class Window:
    """Where a step writes. prefix_lens [bs] int64: committed tokens; slots [bs, w] int64: KV slots behind them, 0
    (SGLang's sink) where a request holds none; deepest [bs] int64: how many drafted tokens each may accept.

    block_tokens, block_positions [bs, block] int64: what the draft reads there, the bonus token and masks.
    host_lens [bs] int64 on the host: no length after the step is greater; under overlap the host lags behind.
    plan: SGLang's record of the same slots, which its forwards are bound to.
    """

    prefix_lens: Tensor
    slots: Tensor
    deepest: Tensor
    block_tokens: Tensor
    block_positions: Tensor
    host_lens: Tensor
    plan: Any

    @classmethod
    def open(cls, batch: Any, runner: Any, shape: Shape, mask_token: int) -> Window:
        """The next slots of each request in the batch, allocated when the batch was prepared, for a tree of a shape."""
        prefix_lens, width = batch.seq_lens, shape.window
        slots, deepest, block_tokens, block_positions = kernels.open_window(
            runner.req_to_token_pool.req_to_token,
            batch.req_pool_indices,
            prefix_lens,
            *batch.spec_info.bounds,
            batch.spec_info.bonus_tokens,
            mask_token,
            width,
            shape.block,
        )
        # Where no attention backend asks the host for lengths, it knows only how much was allocated.
        host_lens = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else batch.spec_info.nxt_kv_lens_cpu
        plan = runner.kv_index_translator.plan(
            req_pool_indices=batch.req_pool_indices,
            seq_lens=prefix_lens,
            seq_lens_cpu=host_lens,
            write_virtual=slots.flatten(),
            read_extent=width,
        )
        return cls(prefix_lens, slots, deepest, block_tokens, block_positions, host_lens + width, plan)


def window_input(tokens: Tensor, positions: Tensor, mask: Tensor, capture: CaptureHiddenMode) -> WindowInput:
    """The pass over tokens [bs, w] at positions [bs, w] under mask [bs, w, w]."""
    return WindowInput(
        draft_token=tokens.flatten(),
        positions=positions.flatten(),
        draft_token_num=tokens.shape[1],
        capture_hidden_mode=capture,
        window_mask=mask,
    )
