"""What a walk accepted, kept: the target's rows at the front of the window, their features as the draft's context."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.kernels import Pools
from sglang_dflash.step.draft_pass import DraftRunner
from sglang_dflash.step.prompts import PromptWindows
from sglang_dflash.step.window import Window
from sglang_dflash.tree import DraftTree, Walk


def commit(
    window: Window,
    tree: DraftTree,
    walked: Walk,
    features: Tensor,
    pools: list[Pools],
    draft: DraftRunner,
    captured: bool,
    prompts: PromptWindows | None = None,
) -> None:
    """Move the walked rows of the target's KV to the window's front, and write their features as draft KV.

    features [(bs + E) * w, layers * hidden]: of every node, then of the prompts' E windows, as the verify pass gave
    them; pools: the target's KV; captured: whether the pass was a CUDA graph.
    """
    width = tree.tokens.shape[1]
    read = () if prompts is None else (prompts.positions.flatten(), prompts.slots.flatten())
    if width == 1:  # roots stay where they are, and graphs of them have written their features
        if not captured:
            draft.write_context(features, *_with((window.prefix_lens, window.slots[:, 0]), read))
        return
    source, destination, rows, positions, slots = kernels.commit_rows(
        window.slots, window.prefix_lens, walked.nodes, walked.lens, width
    )
    if not draft.options.chain:  # a chain's accepted rows are at the front already
        for pool in pools:
            kernels.move_rows(pool, source, destination, len(walked.lens))
    if prompts is not None:
        rows = torch.cat([rows, torch.arange(len(walked.lens) * width, len(features), device=rows.device)])
    draft.write_context(features.index_select(0, rows), *_with((positions, slots), read))


def _with(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each of the first with its own of the second behind it, where there are any."""
    return tuple(torch.cat(pair) for pair in zip(first, second, strict=True)) if second else first
