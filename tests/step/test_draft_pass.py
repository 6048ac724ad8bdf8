"""What a captured draft pass leaves behind, without a GPU: graph memory is played by tensors that are overwritten."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from sglang_dflash.step.draft_pass import DraftRunner
from sglang_dflash.tree import DraftTree


def tree(token: int) -> DraftTree:
    return DraftTree.root(torch.tensor([token, token + 1]))


def test_a_captured_tree_outlives_the_memory_of_its_graph(monkeypatch) -> None:
    runner = object.__new__(DraftRunner)
    runner._captured = {}
    made = [tree(10), tree(20), tree(30)]  # by the two passes that warm up, and the one in the graph
    left = iter(made)
    monkeypatch.setattr(DraftRunner, "_tree", lambda self, hidden, ids, block: next(left))
    batch, output = SimpleNamespace(batch_size=2, input_ids=None), SimpleNamespace(hidden_states=None)
    for _ in made:
        runner._capture_tree(None, output, batch, 2)
    for graphs in made[1:]:
        for x in graphs._tensors():
            x.zero_()  # another graph of the same pool runs
    assert runner._captured[1, 2].tokens.tolist() == [[30], [31]]
    assert runner._captured[1, 2].first(1).tokens.tolist() == [[30]]
