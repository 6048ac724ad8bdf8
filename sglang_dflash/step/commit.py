"""What a walk accepted, kept: the target's rows at the front of the window, their features as the draft's context."""

from __future__ import annotations

from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.kernels import Pools
from sglang_dflash.step.draft_pass import DraftRunner
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
) -> None:
    """Move the walked rows of the target's KV to the window's front, and write their features as draft KV.

    features [bs * w, layers * hidden]: of every node, as the verify pass gave them; pools: the target's KV; captured:
    whether the pass was a CUDA graph.
    """
    if tree.tokens.shape[1] == 1:  # roots stay where they are, and graphs of them have written their features
        if not captured:
            draft.write_context(features, window.prefix_lens, window.slots[:, 0])
        return
    source, destination, rows, positions, slots = kernels.commit_rows(
        window.slots, window.prefix_lens, walked.nodes, walked.lens, tree.tokens.shape[1]
    )
    if not draft.options.chain:  # a chain's accepted rows are at the front already
        for pool in pools:
            kernels.move_rows(pool, source, destination, len(walked.lens))
    draft.write_context(features.index_select(0, rows), positions, slots)
